"""Names of an image's result files: IMAGE.QUESTION, and behind it the depth where it is not the pixels.

    photo.292-tiger.overlay.png                   a class: its index and name; class-292 where it has no name
    photo.292-tiger_not_291-lion.overlay.png      a difference; _and_ for a sum
    photo.text-a-cat.overlay.png                  text:a cat
    photo.patch-3-5.overlay.png                   patch:3,5
    photo.segment-15-cat-at-120-80.overlay.png    segment:cat@120,80; a box alike
    photo.292-tiger.block6.overlay.png            at block 6
    photo.292-tiger.smoothgrad.overlay.png        by another method
    photo.top3.figure.png                         the figure of --top-k 3; of several targets their names with commas

Different questions have different names: where letters are left out that tell two of them apart, as in a prompt with
capitals, in files and in probes, eight digits of a hash follow behind "_".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from dave_fast.explain.depth import PIXELS, name_of
from dave_fast.models.labels import Labels
from dave_fast.targets import Box, Class, Contrast, Patch, Segment, SimilarTo, Sum, Target, Text

_LETTERS, _LONGEST = 40, 100


def question_name(question: Target, labels: Labels) -> str:
    """Return what a question adds to the name of an image's files.

    Args:
        question: as `parse_target` returns it, or the index of a class; −1 for no class.
        labels: the class names of the model.
    """
    return _short(_name(question, labels))


def ending_of(depth: str | int, method: str = "DAVE") -> str:
    """Return what a resolved depth and a method add behind the question: nothing for DAVE of the pixels."""
    return ("" if depth == PIXELS else f".{_depth(depth)}") + ("" if method == "DAVE" else f".{_slug(method)}")


def figure_name(
    questions: Sequence[str], top_k: int | None, depths: Sequence[str | int], methods: Sequence[str] = ("DAVE",)
) -> str:
    """Return what names the figure of an image's results.

    Args:
        questions: the names of its questions.
        top_k: where they are the most probable classes, how many were asked for; else None.
        depths: the resolved depths of each question.
        methods: the names of the methods.
    """
    asked = f"top{top_k}" if top_k is not None and len(questions) > 1 else _short(",".join(questions))
    different = dict.fromkeys(depths)
    asked = asked if list(different) == [PIXELS] else f"{asked}.{','.join(map(_depth, different))}"
    return asked if list(methods) == ["DAVE"] else f"{asked}.{','.join(map(_slug, methods))}"


def _depth(depth: str | int) -> str:
    return name_of(depth).replace(" ", "")


def _name(question: Target, labels: Labels) -> str:
    match question:
        case Class(index=int() as index) | (int() as index) if index >= 0:
            return _class(index, labels)
        case Sum(parts=parts):
            return "_and_".join(_name(part, labels) for part in parts)
        case Contrast(this=this, that=that):
            # a sum that is subtracted is taken away term by term
            return f"{_name(this, labels)}_not_{_name(that, labels).replace('_and_', '_not_')}"
        case Text(prompt=prompt):
            slug = _slug(prompt)
            return f"text-{slug}" if slug.replace("-", " ") == prompt else _marked(f"text-{slug}", prompt.encode())
        case SimilarTo(image=str() as file):
            return _marked(f"like-{_slug(file)}", file.encode(errors="surrogateescape"))
        case Patch(row=row, column=column, weights=None):
            return f"patch-{row}-{column}"
        case Patch(row=row, column=column, weights=weights) if weights is not None:
            return _marked(f"patch-{row}-{column}", weights.double().cpu().numpy().tobytes())
        case Segment(index=index, at=tuple() as at):
            return _placed("segment", index, at, labels)
        case Box(index=index, box=tuple() as box):
            return _placed("box", index, box, labels)
    return "target"


def _class(index: int, labels: Labels) -> str:
    return f"{index}-{_slug(labels.name(index))}".strip("-") if labels.names else f"class-{index}"


def _placed(kind: str, index: int | str, place: Sequence[float], labels: Labels) -> str:
    known = labels.find(index) if isinstance(index, str) else index
    name = _slug(str(index)) if known is None else _class(known, labels)
    name = f"{kind}-{name}-at-{'-'.join(f'{each:.0f}' for each in place)}"
    exact = known is not None and all(each >= 0 and each == int(each) for each in place)
    return name if exact else _marked(name, repr((index, [float(each) for each in place])).encode())


def _slug(text: str) -> str:
    """Return text as a part of a file name: letters, digits and single dashes."""
    return re.sub(r"[^0-9a-z]+", "-", text.casefold())[:_LETTERS].strip("-")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else _marked(name[: _LONGEST - 20], name.encode())


def _marked(name: str, content: bytes) -> str:
    return f"{name.rstrip('-_')}_{hashlib.sha256(content).hexdigest()[:8]}"
