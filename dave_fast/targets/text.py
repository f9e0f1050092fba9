"""Targets as text, in the grammar of `--target`.

    target   class (("+" | "-") class)*                               tiger · 292 · tiger+lion · tiger-lion
             "text:" PROMPT (("+" | "-") "text:" PROMPT)*             text:a cat · text:a cat - text:a dog
             "image:" FILE                                            image:other.jpg
             "patch:" ROW "," COLUMN ["@" FILE ["#" NUMBER]]          patch:3,5 · patch:3,5@probe.safetensors#7
    class    an index, or a name, or a name in double quotes

Names may contain "+" and "-" themselves: of all readings the one with the fewest classes is taken, so that
"three-toed sloth" is one class; double quotes resolve the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from dave_fast.errors import InputError
from dave_fast.models.labels import Labels
from dave_fast.targets import Class, Contrast, Patch, Question, SimilarTo, Sum, Target, Text, load_probe

# signs that may separate classes; the number of readings grows exponentially with it
MOST_SIGNS = 10
_NEXT_TEXT = re.compile(r"\s*([+-])\s*text:")
_PATCH = re.compile(r"\s*(\d+)\s*,\s*(\d+)\s*(?:@(.+?)(?:#(\d+))?)?\s*")


def parse_target(text: str, labels: Labels) -> Question:
    """Parse a target. Files of probes are read.

    Args:
        text: in the grammar above.
        labels: the class names of the model.

    Raises:
        InputError: the text is no target, or fits several classes; the message says how it was read.
    """
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
            f"target {text!r}: this model gives embeddings and has no classes. Ask text:PROMPT (CLIP, SigLIP), "
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
        case Patch(row=row, column=column):
            return f"patch {row}, {column}"
    return "target"


def _prompt(text: str, whole: str) -> Question:
    if not text.strip():
        raise InputError(f"target {whole!r}: the prompt is empty; write text:a cat")
    return Text(text.strip())


def _patch(text: str) -> Question:
    found = _PATCH.fullmatch(text.removeprefix("patch:"))
    if found is None:
        raise InputError(f"target {text!r}: expected patch:ROW,COLUMN or patch:ROW,COLUMN@PROBE#NUMBER")
    row, column, file, number = found.groups()
    if file is None:
        return Patch(int(row), int(column))
    weights = load_probe(file, None if number is None else int(number))
    if weights.dim() == 2 and len(weights) > 1:
        raise InputError(f"target {text!r}: the probe has {len(weights)} rows; say which: @{file}#0")
    return Patch(int(row), int(column), weights.reshape(-1))


def _classes(text: str, labels: Labels) -> Question:
    """Return the reading with the fewest classes."""
    errors: list[tuple[int, InputError]] = []
    found: list[Question] = []
    fewest = 0
    for terms, signs in _readings(text):
        if found and len(terms) > fewest:
            break
        classes, failed = [], []
        for term in terms:
            try:
                classes.append(Class(labels.resolve(term)))
            except InputError as error:
                failed.append(error)
        if failed:
            errors.append((len(failed), failed[0]))
        else:
            fewest = len(terms)
            found.append(_together(classes, signs))
    if len(found) > 1:
        readings = " or ".join(repr(describe_target(each, labels)) for each in found)
        raise InputError(f"target {text!r} may be {readings}; put names into double quotes")
    if not found:
        # the error of the reading with the fewest unknown names, and of those the one with the most classes
        raise min(reversed(errors), key=lambda each: each[0])[1]
    return found[0]


def _readings(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (terms, signs between them), with one term first, cut at ever more of the signs outside of quotes."""
    quoted = [match.span() for match in re.finditer(r'"[^"]*"', text)]
    places = [
        at
        for at, letter in enumerate(text)
        if letter in "+-" and text[:at].strip() and not any(start <= at < end for start, end in quoted)
    ]
    for count in range(min(len(places), MOST_SIGNS) + 1):
        for chosen in combinations(places, count):
            edges = [-1, *chosen, len(text)]
            terms = [text[a + 1 : b].strip().strip('"') for a, b in pairwise(edges)]
            yield terms, [text[at] for at in chosen]


def _together(parts: Sequence[Question], signs: Sequence[str]) -> Question:
    """Combine the parts as parts[0] ± parts[1] ± …."""
    added = [parts[0], *(part for part, sign in zip(parts[1:], signs, strict=True) if sign == "+")]
    taken = [part for part, sign in zip(parts[1:], signs, strict=True) if sign == "-"]
    this = added[0] if len(added) == 1 else Sum(*added)
    if not taken:
        return this
    return Contrast(this, taken[0] if len(taken) == 1 else Sum(*taken))
