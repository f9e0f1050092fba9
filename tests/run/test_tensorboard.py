"""Tests of exports as TensorBoard's event files, read by TensorBoard itself."""

import io

import numpy as np
import pytest
from PIL import Image

import dave_fast
from dave_fast.run.export import export
from tests.run import made

pytest.importorskip("tensorboard", reason="an extra: dave-fast[export]")


def test_each_class_has_its_overlays_step_by_step_and_text_that_names_the_record(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    photos = made.scenes(tmp_path / "photos", 3)
    rows = [
        {"id": f"<b>{path.name}\n# x", "uri": str(path), "target": number // 2} for number, path in enumerate(photos)
    ]
    made.make_run(tmp_path / "run", rows, names=["a/b <i>", *made.NAMES[1:]], raw=True)
    assert export(dave_fast.open_maps(tmp_path / "run"), "tensorboard", tmp_path / "events") == 0
    read = EventAccumulator(str(tmp_path / "events"), {"images": 0, "tensors": 0}).Reload()
    one, two = "0_a_b_i_", "1_digit_1"
    assert read.Tags()["images"] == [f"{kind}/{tag}" for tag in (one, two) for kind in ("overlay", "signed")]
    events = read.Images(f"overlay/{one}")
    assert [event.step for event in events] == [0, 1]
    with Image.open(io.BytesIO(events[0].encoded_image_string)) as picture:
        assert picture.size == (448, 448) and np.asarray(picture).std() > 5
    texts = [event.tensor_proto.string_val[0].decode() for event in read.Tensors(f"record/{one}/text_summary")]
    assert len(texts) == 2 and "id: <b>1.png # x" in texts[1]
    # every line is code, in which Markdown and HTML mean nothing
    assert all(line.startswith("    ") for text in texts for line in text.split("\n"))
