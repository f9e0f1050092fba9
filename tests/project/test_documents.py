"""Test that the documents agree with the code: commands parse, Python compiles, links and anchors lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from dave_fast.cli.app import COMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAM = get_command(app)
# its Python is signatures without bodies
NO_PROGRAM = {"CONTRIBUTING.md"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# commands in a line of text that leave out what a reader fills in: their options are looked up, not their arguments
INLINE = re.compile(r"`([^`\n]*\bdave-fast [a-z][^`\n]*)`")
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """Return the fenced blocks of a page, and its indented ones, each with its language."""
    text = text_of(page)
    found = BLOCK.findall(text)
    indented = re.findall(r"(?:^ {4}\S.*\n)+", BLOCK.sub("", text), re.MULTILINE)
    return [*found, *(("sh", re.sub("^ {4}", "", each, flags=re.MULTILINE)) for each in indented)]


def commands(text):
    """Return the arguments of each dave-fast command in lines of a shell."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "dave-fast" not in line:
            continue
        words = shlex.split(line, comments=True)
        while words:
            end = next((at for at, word in enumerate(words) if word in ("&&", "|", ";", ">", "&")), len(words))
            first, words = words[:end], words[end + 1 :]
            # settings of the environment stand before the command
            first = first[next((at for at, word in enumerate(first) if "=" not in word), len(first)) :]
            if first and first[0].rpartition("/")[2] == "dave-fast":
                found.append(first[1:])
    return found


def parse(arguments):
    """Parse the arguments of a command without running it."""
    name, *rest = arguments
    assert name in PROGRAM.commands, f"there is no command {name}"
    PROGRAM.commands[name].make_context(name, list(rest))


@pytest.mark.parametrize("name", PROGRAM.commands)
def test_the_example_of_every_command_parses_and_is_in_its_help(name):
    (example,) = (text for command, text in COMMANDS.items() if command.__name__ == name)
    ((own, *rest),) = commands(example)
    assert own == name
    parse([own, *rest])
    assert PROGRAM.commands[name].epilog == f"Example: {example}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_blocks_parse(page):
    for language, text in blocks(page):
        for arguments in commands(text) if language in ("sh", "") else ():
            if not arguments[0].startswith("-"):
                parse(arguments)


def test_documents_have_commands():
    assert sum(len(commands(text)) for page in PAGES for _, text in blocks(page)) > 30


def options_of(command):
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_in_a_line_of_text_exist(page):
    for text in INLINE.findall(BLOCK.sub("", text_of(page))):
        name, *rest = text.partition("dave-fast ")[2].split()
        assert name in PROGRAM.commands, text
        given = [re.match(r"--[a-z-]+", word)[0] for word in rest if word.startswith("--")]
        assert set(given) <= options_of(PROGRAM.commands[name]), text


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NO_PROGRAM])
def test_python_compiles(page):
    for language, code in BLOCK.findall(text_of(page)):
        if language == "python":
            compile(code, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def anchors(page):
    """Return the anchors of a page's headings as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{at}" if at else slug for slug, most in found.items() for at in range(most + 1)}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    for link in LINK.findall(BLOCK.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        known = target.suffix != ".md" or not anchor or anchor in anchors(target.resolve().relative_to(ROOT))
        if not target.exists() or not known:
            broken.append(link)
    assert not broken
