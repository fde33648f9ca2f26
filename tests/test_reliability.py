"""The commands in docs/reliability.md can be run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text("utf-8")
COMMANDS = re.findall(r"^\|[^|]+\| `(make [^`]+)` \|$", TEXT, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_targets_and_tests_that_are_there(command: str) -> None:
    _, target, *rest = shlex.split(command)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M)
    arguments = shlex.split(rest[0].removeprefix("ARGS=")) if rest else []
    named = [argument for argument in arguments if argument.startswith("tests/")]
    assert bool(named) == bool(rest)
    for name in named:
        text = (ROOT / name).read_text("utf-8")
        assert "tally" in text or name.endswith(("test_properties.py", "test_journal.py"))
        assert "slow" not in arguments or "pytest.mark.slow" in text


def test_every_campaign_has_a_command() -> None:
    assert len(COMMANDS) == TEXT.count("\n| ", 0, TEXT.index("\n## ")) - 1
