"""Targets as text, in the grammar of `--target`.

    target   class (("+" | "-") class)*                               tiger · 292 · tiger+lion · tiger-lion
             "text:" PROMPT (("+" | "-") "text:" PROMPT)*             text:a cat · text:a cat - text:a dog
             "image:" FILE                                            image:other.jpg
             "patch:" ROW "," COLUMN ["@" FILE ["#" NUMBER]]          patch:3,5 · patch:3,5@probe.safetensors#7
             "segment:" class "@" Y "," X                             segment:cat@120,80
             "box:" class "@" LEFT "," TOP "," RIGHT "," BOTTOM       box:cat@20,40,180,200
    class    an index, or a name, or a name in double quotes

Places are in pixels of the model's input. Segments and boxes have sums and differences like those of texts.
Names may contain "+" and "-" themselves: of all readings the one with the fewest classes is taken, so that
"three-toed sloth" is one class; double quotes resolve the rest. A sign that directly follows a sign separates nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice

from dave_fast.errors import InputError
from dave_fast.models.labels import Labels
from dave_fast.numbers import number_in, shown, whole_in
from dave_fast.targets import (
    Box,
    Class,
    Contrast,
    Patch,
    Question,
    Segment,
    Similarity,
    SimilarTo,
    Sum,
    Target,
    Text,
    load_probe,
)

# letters of a target; signs that may separate its classes, whose names are looked up once for each pair of signs
MOST_LETTERS, MOST_SIGNS = 10_000, 16
# readings that are told where several fit
_TOLD = 4
# what stands between two signs: the index of a class, or text that is none
Terms = dict[tuple[int, int], int | str]


def parse_target(text: str, labels: Labels, *, files: bool = True, most_signs: int = MOST_SIGNS) -> Question:
    """Parse a target. Files of probes are read.

    Args:
        text: in the grammar above.
        labels: the class names of the model.
        files: whether the text may name files; False for a text of somebody else's.
        most_signs: signs that may separate classes.

    Raises:
        InputError: the text is no target, or fits several classes; the message says how it was read.
    """
    if len(text) > MOST_LETTERS:
        raise InputError(f"the target has {len(text)} letters; expected at most {MOST_LETTERS}: {shown(text)}")
    text = text.strip()
    for word, read in _TERMS.items():
        if text.startswith(word):
            first, *others = re.split(rf"([+-])\s*{word}", text.removeprefix(word))
            if len(others) > 2 * most_signs:
                raise InputError(f"target {shown(text)} has {len(others) // 2} signs; expected at most {most_signs}")
            return _together([read(first, text), *(read(each, text) for each in others[1::2])], others[::2])
    if not files and (text.startswith("image:") or (text.startswith("patch:") and "@" in text)):
        raise InputError(f"target {shown(text)} names a file, which is not read here")
    if text.startswith("image:"):
        return SimilarTo(text.removeprefix("image:").strip())
    if text.startswith("patch:"):
        return _patch(text)
    if labels.count == 0:
        raise InputError(
            f"target {shown(text)}: this model gives embeddings and has no classes. Ask text:PROMPT (CLIP, SigLIP), "
            "image:FILE, patch:ROW,COLUMN for an output with tokens, segment:CLASS@Y,X for a segmentation, or "
            "box:CLASS@LEFT,TOP,RIGHT,BOTTOM for detections."
        )
    return _classes(text, labels, most_signs)


def describe_target(target: Target, labels: Labels) -> str:
    """Return a target in words, for captions and files."""
    match target:
        case Class(index=index) | (int() as index):
            return _name(index, labels)
        case Sum(parts=parts):
            return " + ".join(describe_target(part, labels) for part in parts)
        case Contrast(this=this, that=that):
            # a sum that is subtracted is written term by term
            taken = describe_target(that, labels).replace(" + ", " − ")
            return f"{describe_target(this, labels)} − {taken}"
        case Text(prompt=prompt):
            return f"“{prompt}”"
        case SimilarTo(image=str() as file):
            return f"like {file}"
        case Similarity(words=words) if words:
            return words
        case Patch(row=row, column=column):
            return f"patch {row}, {column}"
        case Segment(index=index, at=at):
            where = "in a mask" if at is None else f"at {at[0]:g}, {at[1]:g}"
            return f"{_name(index, labels)} {where}"
        case Box(index=index, query=int() as query):
            return f"{_name(index, labels)} in detection {query}"
        case Box(index=index, box=tuple() | list() as box):
            edges = ", ".join(f"{each:g}" for each in box)
            return f"{_name(index, labels)} in the box {edges}"
        case Box(index=index):
            return f"{_name(index, labels)} in the box"
    return "target"


def _name(index: int | str, labels: Labels) -> str:
    known = labels.find(index) if isinstance(index, str) else index
    return str(index) if known is None else labels.name(known)


def _prompt(text: str, whole: str) -> Question:
    if not text.strip():
        raise InputError(f"target {shown(whole)}: the prompt is empty; write text:a cat")
    return Text(text.strip())


def _segment(text: str, whole: str) -> Question:
    index, (y, x) = _placed(text, whole, "segment:CLASS@Y,X")
    return Segment(index, at=(y, x))


def _box(text: str, whole: str) -> Question:
    index, (left, top, right, bottom) = _placed(text, whole, "box:CLASS@LEFT,TOP,RIGHT,BOTTOM")
    return Box(index, (left, top, right, bottom))


def _placed(text: str, whole: str, form: str) -> tuple[int | str, list[float]]:
    """Return the class, by index or name, and the numbers of its place, as many as the form has."""
    name, _, place = text.rpartition("@")
    name, parts = name.strip().strip('"'), place.split(",")
    numbers = [each for part in parts if (each := number_in(part.strip())) is not None]
    if not name or len(numbers) != len(parts) or len(parts) != form.count(",") + 1:
        raise InputError(f"target {shown(whole)}: expected {form}, in pixels of the model's input")
    index = whole_in(name)
    return (name if index is None else index), numbers


# forms that have sums and differences
_TERMS: dict[str, Callable[[str, str], Question]] = {"text:": _prompt, "segment:": _segment, "box:": _box}


def _patch(text: str) -> Question:
    place, at, file = text.removeprefix("patch:").partition("@")
    found = [whole_in(part.strip()) for part in place.split(",", 2)]
    file, number = file.strip(), None
    before, mark, last = file.rpartition("#")
    if mark and (number := whole_in(last)) is not None:
        file = before
    row, column = found if len(found) == 2 else (None, None)
    if row is None or column is None or min(row, column, number or 0) < 0 or bool(at) != bool(file):
        raise InputError(f"target {shown(text)}: expected patch:ROW,COLUMN or patch:ROW,COLUMN@PROBE#NUMBER")
    if not file:
        return Patch(row, column)
    weights = load_probe(file, number)
    if weights.dim() == 2 and len(weights) > 1:
        raise InputError(f"target {shown(text)}: the probe has {len(weights)} rows; say which: @{file}#0")
    return Patch(row, column, weights.reshape(-1))


def _classes(text: str, labels: Labels, most_signs: int) -> Question:
    """Return the reading with the fewest classes."""

    @cache
    def resolved(name: str) -> int | str:
        index = labels.find(name)
        return name if index is None else index

    # one class, whatever signs its name has
    name = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    if '"' not in name and isinstance(whole := resolved(name), int):
        return Class(whole)
    cuts = _cuts(text, most_signs)
    edges = [-1, *cuts, len(text)]
    terms: Terms = {}
    for start, first in enumerate(edges[:-1]):
        for stop in range(start + 1, len(edges)):
            terms[start, stop] = resolved(text[first + 1 : edges[stop]].strip().strip('"'))
    readings = [_reading(text, edges, terms, ends) for ends in islice(_fewest(terms, len(cuts) + 1), _TOLD)]
    if not readings:
        # raises the error of this name alone, whose hint takes time
        labels.resolve(_first_unknown(terms, len(cuts) + 1))
    if len(readings) > 1:
        told = " or ".join(repr(describe_target(each, labels)) for each in readings)
        raise InputError(f"target {shown(text)} may be {told}; put names into double quotes")
    return readings[0]


def _cuts(text: str, most_signs: int) -> list[int]:
    """Return where the signs are that may separate classes: outside of quotes, behind something, not behind a sign."""
    parts = text.split('"')
    if len(parts) % 2 == 0:
        raise InputError(f"target {shown(text)}: a double quote is not closed; write names in two of them")
    cuts, at = [], 0
    for number, part in enumerate(parts):
        for match in re.finditer("[+-]", part) if number % 2 == 0 else ():
            here = at + match.start()
            if here and text[here - 1] not in "+-" and (number or part[: match.start()].strip()):
                cuts.append(here)
        at += len(part) + 1
    if len(cuts) > most_signs:
        raise InputError(
            f"target {shown(text)} has {len(cuts)} signs between names; expected at most {most_signs}: put names with "
            "signs of their own into double quotes"
        )
    return cuts


def _fewest(terms: Terms, last: int) -> Iterator[list[int]]:
    """Yield the ends of the terms of each reading of known classes that has the fewest, earliest cuts first."""
    # terms from an edge to the last one, and the ends of the first of them that lead to as few
    fewest, ends = {last: 0}, {}
    for start in reversed(range(last)):
        known = [stop for stop in fewest if isinstance(terms[start, stop], int)]
        if known:
            fewest[start] = 1 + min(fewest[stop] for stop in known)
            ends[start] = sorted(stop for stop in known if 1 + fewest[stop] == fewest[start])

    def walk(start: int) -> Iterator[list[int]]:
        for stop in ends.get(start, ()):
            yield from ([stop, *rest] for rest in ([[]] if stop == last else walk(stop)))

    return walk(0)


def _first_unknown(terms: Terms, last: int) -> str:
    """Return the first name that is no class of the reading with the fewest such, and of those with the most terms."""
    best: dict[int, tuple[int, int, int]] = {last: (0, 0, last)}
    for start in reversed(range(last)):
        best[start] = min(
            (best[stop][0] + isinstance(terms[start, stop], str), best[stop][1] - 1, stop)
            for stop in range(start + 1, last + 1)
        )
    start = 0
    while isinstance(found := terms[start, best[start][2]], int):
        start = best[start][2]
    return found


def _reading(text: str, edges: list[int], terms: Terms, ends: list[int]) -> Question:
    classes = [Class(terms[pair]) for pair in zip([0, *ends], ends, strict=False)]
    return _together(classes, [text[edges[end]] for end in ends[:-1]])


def _together(parts: Sequence[Question], signs: Sequence[str]) -> Question:
    """Combine the parts as parts[0] ± parts[1] ± …."""
    added = [parts[0], *(part for part, sign in zip(parts[1:], signs, strict=True) if sign == "+")]
    taken = [part for part, sign in zip(parts[1:], signs, strict=True) if sign == "-"]
    this = added[0] if len(added) == 1 else Sum(*added)
    if not taken:
        return this
    return Contrast(this, taken[0] if len(taken) == 1 else Sum(*taken))
