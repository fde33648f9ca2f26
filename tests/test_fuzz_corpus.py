"""Inputs that the fuzzer found or reached something new with, and its seeds, once more each.

`make fuzz` looks for others; see `tests/fuzz/run.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuzz import seeds, targets
from tests.fuzz.run import CORPUS, NAMES
from tests.helpers import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY = 64 << 20


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", NAMES)
def test_corpus_is_read_or_refused(name: str, tally: Callable[..., None]) -> None:
    found = [*corpus(name), *seeds.of(name)]
    with peak_memory(MEMORY):
        accepted = sum(targets.run(name, data) for data in found)
    assert 0 < accepted < len(found)
    tally("inputs accepted", accepted)
    tally("inputs refused", len(found) - accepted)


def test_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    assert {path.parent.name for path in files} <= set(NAMES) == set(targets.TARGETS)
    assert max(sizes) <= seeds.LONGEST
    assert sum(sizes) < 300_000


@pytest.mark.parametrize(
    "act",
    [
        lambda: __import__("this"),
        lambda: eval("1 + 1"),
        lambda: os.system("true"),
        lambda: subprocess.run([sys.executable, "-V"], check=False),
        lambda: Path(os.devnull).read_bytes(),
        lambda: os.open(os.devnull, os.O_WRONLY),
    ],
)
def test_targets_notice_what_no_reader_may_do(
    act: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.TARGETS, "pickle", lambda data: act() and None)
    with pytest.raises(targets.Trespass):
        targets.run("pickle", b"")
    act_again = targets.run("rewrite", b"N.")
    assert act_again
