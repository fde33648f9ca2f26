"""The tree that `inspect` draws, of checkpoints in pieces."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.conftest import FIXTURES
from tests.sharded import done

if TYPE_CHECKING:
    from pathlib import Path

PIECES = FIXTURES / "pieces"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which every row fits."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("dcp", "__0_0.distcp", "__3_0.distcp"),
        ("tensors_rank_1.pt", "tensors_rank_0.pt", "tensors_rank_3.pt"),
    ],
)
def test_all_tells_in_which_files_each_tensor_lies(name: str, first: str, last: str) -> None:
    rows = done("inspect", "--all", PIECES / name).splitlines()
    assert "tensors in 4 files" in rows[0]
    told = {row.split()[1]: row.partition(" B  ")[2] for row in rows if " B " in row}
    assert told["few"].strip() == first
    for key in ("rows", "columns", "turned", "grid"):
        assert [told[key].split(", ")[place].strip() for place in (0, 3)] == [first, last], key
    assert first not in done("inspect", PIECES / name).partition("\n")[2]


def test_replicas_lie_in_the_files_that_were_read(tmp_path: Path) -> None:
    for rank in (2, 3):
        shutil.copy(PIECES / f"replicas_rank_{rank}.pt", tmp_path)
    shown = done("inspect", "--all", tmp_path)
    assert "tensors in 2 files" in shown
    assert "replicas_rank_2.pt, replicas_rank_3.pt" in shown


def test_what_lies_in_one_file_is_not_told_to() -> None:
    assert "tied.pt" not in done("inspect", "--all", FIXTURES / "tied.pt").partition("\n")[2]
