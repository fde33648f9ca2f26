"""Parts of a file that was split: `split` made them, and the command that is said joins them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import torch

from ckptfix import door
from ckptfix.errors import DamagedError, ReadError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("suffix", [".", ".part", "_", ".part-"])
@pytest.mark.parametrize("digits", [[], ["-d"], ["-d", "-a", "3"]])
def test_each_part_is_called_that_and_the_command_joins_them(
    digits: list[str], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.arange(999.0)}, "my model.pt")
    subprocess.run(
        ["split", *digits, "-n", "12", "my model.pt", f"my model.pt{suffix}"], check=True
    )
    parts = sorted(path.name for path in tmp_path.iterdir() if path.name != "my model.pt")
    whole = (tmp_path / "my model.pt").read_bytes()
    (tmp_path / "my model.pt").unlink()
    for part in parts:
        with pytest.raises(DamagedError, match="one of 12 parts") as caught:
            door.read(part)
    assert caught.value.hint is not None
    command = str(caught.value.hint.command)
    subprocess.run(command, shell=True, check=True)
    assert (tmp_path / "my model.pt").read_bytes() == whole
    assert subprocess.run(command, shell=True, check=False, capture_output=True).returncode


def test_a_whole_file_with_such_a_name_is_read(tmp_path: Path) -> None:
    for number in range(2):
        torch.save({"w": torch.ones(2)}, tmp_path / f"model.pt.{number}")
    assert "w" in door.read(tmp_path / "model.pt.1").root


def test_one_damaged_file_with_such_a_name_is_damaged(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt.1")
    path = tmp_path / "model.pt.1"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ReadError) as caught:
        door.read(path)
    assert "parts" not in caught.value.message
