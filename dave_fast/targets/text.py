"""Targets as text, in the grammar of `--target`.

    target   class (("+" | "-") class)*                               tiger · 292 · tiger+lion · tiger-lion
             "text:" PROMPT (("+" | "-") "text:" PROMPT)*             text:a cat · text:a cat - text:a dog
             "image:" FILE                                            image:other.jpg
             "patch:" ROW "," COLUMN ["@" FILE ["#" NUMBER]]          patch:3,5 · patch:3,5@probe.safetensors#7
    class    an index, or a name, or a name in double quotes

Names may contain "+" and "-" themselves: of all readings the one with the fewest classes is taken, so that
"three-toed sloth" is one class; double quotes resolve the rest. A sign that directly follows a sign separates nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice

from dave_fast.errors import InputError
from dave_fast.models.labels import Labels
from dave_fast.numbers import shown, whole_in
from dave_fast.targets import Class, Contrast, Patch, Question, Similarity, SimilarTo, Sum, Target, Text, load_probe

# letters of a target; signs that may separate its classes, whose names are looked up once for each pair of signs
MOST_LETTERS, MOST_SIGNS = 10_000, 16
# readings that are told where several fit
_TOLD = 4
_NEXT_TEXT = re.compile(r"([+-])\s*text:")


def parse_target(text: str, labels: Labels) -> Question:
    """Parse a target. Files of probes are read.

    Args:
        text: in the grammar above.
        labels: the class names of the model.

    Raises:
        InputError: the text is no target, or fits several classes; the message says how it was read.
    """
    if len(text) > MOST_LETTERS:
        raise InputError(f"the target has {len(text)} letters; expected at most {MOST_LETTERS}: {shown(text)}")
    text = text.strip()
    if text.startswith("text:"):
        first, *others = _NEXT_TEXT.split(text.removeprefix("text:"))
        return _together([_prompt(first, text), *(_prompt(each, text) for each in others[1::2])], others[::2])
    if text.startswith("image:"):
        return SimilarTo(text.removeprefix("image:").strip())
    if text.startswith("patch:"):
        return _patch(text)
    if labels.count == 0:
        raise InputError(
            f"target {shown(text)}: this model gives embeddings and has no classes. Ask text:PROMPT (CLIP, SigLIP), "
            "image:FILE, or patch:ROW,COLUMN for an output with tokens."
        )
    return _classes(text, labels)


def describe_target(target: Target, labels: Labels) -> str:
    """Return a target in words, for captions and files."""
    match target:
        case Class(index=str() as name):
            return name
        case Class(index=index) | (int() as index):
            return labels.name(int(index))
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
    return "target"


def _prompt(text: str, whole: str) -> Question:
    if not text.strip():
        raise InputError(f"target {shown(whole)}: the prompt is empty; write text:a cat")
    return Text(text.strip())


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


def _classes(text: str, labels: Labels) -> Question:
    """Return the reading with the fewest classes."""
    cuts = _cuts(text)
    edges = [-1, *cuts, len(text)]
    terms: dict[tuple[int, int], int | InputError] = {}

    @cache
    def resolved(name: str) -> int | InputError:
        try:
            return labels.resolve(name)
        except InputError as error:
            return error

    for start, first in enumerate(edges[:-1]):
        for stop in range(start + 1, len(edges)):
            terms[start, stop] = resolved(text[first + 1 : edges[stop]].strip().strip('"'))
    readings = [_reading(text, edges, terms, ends) for ends in islice(_fewest(terms, len(cuts) + 1), _TOLD)]
    if not readings:
        raise _first_error(terms, len(cuts) + 1)
    if len(readings) > 1:
        told = " or ".join(repr(describe_target(each, labels)) for each in readings)
        raise InputError(f"target {shown(text)} may be {told}; put names into double quotes")
    return readings[0]


def _cuts(text: str) -> list[int]:
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
    if len(cuts) > MOST_SIGNS:
        raise InputError(
            f"target {shown(text)} has {len(cuts)} signs between names; expected at most {MOST_SIGNS}: put names with "
            "signs of their own into double quotes"
        )
    return cuts


def _fewest(terms: dict[tuple[int, int], int | InputError], last: int) -> Iterator[list[int]]:
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


def _first_error(terms: dict[tuple[int, int], int | InputError], last: int) -> InputError:
    """Return the first error of the reading with the fewest unknown names, and of those of one with the most terms."""
    best: dict[int, tuple[int, int, int]] = {last: (0, 0, last)}
    for start in reversed(range(last)):
        best[start] = min(
            (best[stop][0] + isinstance(terms[start, stop], InputError), best[stop][1] - 1, stop)
            for stop in range(start + 1, last + 1)
        )
    start = 0
    while isinstance(found := terms[start, best[start][2]], int):
        start = best[start][2]
    return found


def _reading(text: str, edges: list[int], terms: dict[tuple[int, int], int | InputError], ends: list[int]) -> Question:
    classes = [Class(terms[pair]) for pair in zip([0, *ends], ends, strict=False)]  # type: ignore[arg-type]
    return _together(classes, [text[edges[end]] for end in ends[:-1]])


def _together(parts: Sequence[Question], signs: Sequence[str]) -> Question:
    """Combine the parts as parts[0] ± parts[1] ± …."""
    added = [parts[0], *(part for part, sign in zip(parts[1:], signs, strict=True) if sign == "+")]
    taken = [part for part, sign in zip(parts[1:], signs, strict=True) if sign == "-"]
    this = added[0] if len(added) == 1 else Sum(*added)
    if not taken:
        return this
    return Contrast(this, taken[0] if len(taken) == 1 else Sum(*taken))
