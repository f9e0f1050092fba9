"""Keywords in messages of the library as the options of the command that prints them.

A message says precision='bf16', and on the command line that is --precision bf16. Only keywords that the command has
as options are changed, and bare words only where they have an underscore: "precision" is a word of English too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import typer

# keywords that an option has in the singular
_SINGULAR = {"targets": "target"}
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[\w.%-]*\w"""
# not behind a quote, an option's dashes or a part of a path or name
_KEYWORD = re.compile(rf"(?<![\w'\"`./\\-])([a-z]+(?:_[a-z]+)*)(=(?:{_VALUE})?|(?!\.\w|[\w='\"(/\\-]))")


def options_of(context: typer.Context) -> dict[str, tuple[str, str | None]]:
    """Return by keyword the option of the command that runs, and for a switch the one that turns it off."""
    found: dict[str, tuple[str, str | None]] = {}
    for parameter in context.command.params:
        off = next(iter(parameter.secondary_opts), None)
        found |= {name[2:].replace("-", "_"): (name, off) for name in parameter.opts if name.startswith("--")}
    return found


def as_options(text: str, options: Mapping[str, tuple[str, str | None]]) -> str:
    """Return a message with options in place of keywords.

    Args:
        text: the message.
        options: as `options_of` returns them.
    """

    def replaced(match: re.Match[str]) -> str:
        keyword, value = match[1], match[2]
        name, off = options.get(_SINGULAR.get(keyword, keyword), (None, None))
        if name is None or (not value and "_" not in keyword):
            return match[0]
        value = value.removeprefix("=").strip("'\"")
        if value in ("True", "False") and off is not None:
            return name if value == "True" else off
        return f"{name} {value}" if value and value != "None" else name

    return _KEYWORD.sub(replaced, text)
