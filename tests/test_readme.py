"""The commands that the README shows exist, with the options that it gives them."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from pipelines.cli import app

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """`userrep ...` lines of the code blocks of the documents, without comments; continued ones are one."""
    found = []
    for document in (ROOT / "README.md", ROOT / "cluster/README.md"):
        for block in re.findall(r"```\n(.*?)```", document.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.split("#")[0].split(">")[0].strip() for line in lines if line.startswith("userrep ")]
    return found


def test_readme_shows_commands() -> None:
    assert len(commands()) >= 9


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(command)[1:]
    subcommand = group.commands[name]
    while hasattr(subcommand, "commands") and arguments:  # a group: `userrep tables list`
        name, *arguments = arguments
        subcommand = subcommand.commands[name]
    subcommand.make_context(name, arguments)


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text())) <= targets
