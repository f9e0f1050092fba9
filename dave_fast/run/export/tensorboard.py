"""The maps of a run as event files of TensorBoard: pictures, and what they are as text."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from dave_fast.run.export.job import Job, Photographs, package, whole
from dave_fast.run.export.pictures import laid_over


def write_tensorboard(job: Job) -> int:
    """Write the overlays of each class under a tag of their own, a step each; return how many images were not found.

    The text of the same tag and step says which record it is.
    """
    package("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    photographs = Photographs(job)
    with whole(job.target, folder=True) as folder, SummaryWriter(str(folder)) as writer:
        steps: Counter[str] = Counter()
        for number, row in enumerate(job.maps):
            facts = job.facts(row)
            # other characters are none for TensorBoard's tags
            tag = re.sub(r"[^-\w.]+", "_", f"{row.target}_{facts['target_name']}", flags=re.ASCII)
            crop = photographs.crop(row)
            for kind, picture in ({} if crop is None else laid_over(row, crop)).items():
                writer.add_image(f"{kind}/{tag}", np.asarray(picture), steps[tag], dataformats="HWC")
            # indented by four, a line is code in Markdown: no name is anything but text
            lines = [f"    {name}: {' '.join(str(value).split())}" for name, value in facts.items()]
            writer.add_text(f"record/{tag}", "\n".join(lines), steps[tag])
            steps[tag] += 1
            job.progress(number + 1)
        photographs.check()
    return photographs.missing
