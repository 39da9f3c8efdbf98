"""What the documents promise is there: make targets, commands, flags, files."""

from __future__ import annotations

import configparser
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from toolkit.cli import main

ROOT = Path(__file__).parent.parent
GENERATED = {".git", ".venv", "build", "dist", "node_modules", "__pycache__"}
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/**/*.md")}
)

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def files_of_the_repository() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if GENERATED.isdisjoint(parts) and not any(p.endswith("_cache") for p in parts):
            yield path


def commands_in(text: str) -> list[list[str]]:
    """The words of every command in a fenced block or an inline code span."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose)
    commands = []
    for line in lines:
        for command in re.split(r" \| |&&|;", line.strip().removeprefix("$ ")):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                continue  # an apostrophe in a block of something else than commands
            commands.append(words)
    return [words for words in commands if words]


def make_targets(words: list[str]) -> list[str]:
    if words[0] != "make":
        return []
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")]


def unknown_in_call(words: list[str]) -> list[str]:
    """What a call of `toolkit` names that the command line does not have."""
    command: click.Command = main
    unknown: list[str] = []
    rest = words[1:]
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word != "-":
            flag, _, value = word.partition("=")
            options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
            if flag not in {*options, "--help", "-h"}:
                unknown.append(flag)
            elif (option := options.get(flag)) and takes_value(option) and not value:
                rest[:1] = []
        elif isinstance(command, click.Group):
            *others, last = word.split("|")  # `store du|gc` names two commands
            unknown += [name for name in (*others, last) if name not in command.commands]
            command = command.commands.get(last, click.Command(last))
    return unknown


def takes_value(option: click.Parameter) -> bool:
    return isinstance(option, click.Option) and not option.is_flag and not option.count


def test_readme_opens_with_the_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    commands = commands_in(readme)

    assert commands[0] == ["make", "demo"]


@each_document
def test_every_make_target_named_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))

    named = {
        target
        for words in commands_in(document.read_text(encoding="utf-8"))
        for target in make_targets(words)
    }

    assert named <= targets


@each_document
def test_every_toolkit_call_named_exists(document: Path) -> None:
    calls = [
        words
        for words in commands_in(document.read_text(encoding="utf-8"))
        if words[0] in ("toolkit", ".venv/bin/toolkit")
    ]

    unknown = {" ".join(words): unknown_in_call(words) for words in calls}

    assert {call: names for call, names in unknown.items() if names} == {}


@pytest.mark.parametrize(
    ("call", "unknown"),
    [
        ("toolkit build cats --local --name x", []),
        ("toolkit --data-dir elsewhere build cats", []),
        ("toolkit store du|gc", []),
        ("toolkit store du|melt", ["melt"]),
        ("toolkit bild cats", ["bild"]),
        ("toolkit build cats --fast", ["--fast"]),
    ],
)
def test_a_call_that_does_not_exist_is_found_out(call: str, unknown: list[str]) -> None:
    document = f"Type `{call}`:\n\n```sh\n$ {call}  # comment\n```\n"

    commands = commands_in(document)

    assert [unknown_in_call(words) for words in commands] == [unknown, unknown]


@each_document
def test_every_local_link_leads_to_a_file(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text)
    targets += re.findall(r"""(?:src|href)=["']([^"']+)""", text)

    local = {t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:", t)} - {""}

    assert {link for link in local if not (document.parent / link).exists()} == set()


def enforced_layers(contract: str) -> list[list[str]]:
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    lines = config[f"importlinter:contract:{contract}"]["layers"].strip().splitlines()
    return [line.split(" : ") for line in lines]


def test_the_layers_drawn_are_those_enforced() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"^```\n(cli\n.+?)^```", text, re.M | re.S)

    drawn = [re.split(r"  only |  the ", line)[0] for line in drawing.splitlines()]
    rooms = [line.split() for line in drawn if not line.startswith(" ")]
    embedding = [line.split() for line in drawn if line.startswith(" ")]

    assert rooms == enforced_layers("layers")
    assert embedding == enforced_layers("embedding")


def test_nobody_is_told_to_install_a_stranger() -> None:
    # On the package index the plain name `toolkit` belongs to another project.
    stranger = re.compile(rb"""pip3?\s+install\s+(?:-\S+\s+)*["']?toolkit\b""")

    telling = [
        path.relative_to(ROOT)
        for path in files_of_the_repository()
        if path.is_file() and path.suffix != ".webp" and stranger.search(path.read_bytes())
    ]

    assert telling == []
