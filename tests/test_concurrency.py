"""Several processes at one file: one wins or is told, and nothing is torn.

No test depends on how fast anything is: one process stops at its Nth call that changes a disk, for
each N that there is, and others run from beginning to end meanwhile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.bytes import journal
from ckptfix.tree.compare import difference
from tests.conftest import FIXTURES
from tests.faults import Stopped
from tests.oracles import unlike

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not hasattr(os, "WUNTRACED"), reason="needs job control")

TRAINING = FIXTURES / "dataparallel_cuda_training.pt"
CALLS = 40
"""More than any command here makes: its files are small."""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stopped_at_each(tmp_path: Path, *arguments: Any) -> Iterator[Stopped]:
    """The command, stopped at each of its calls; who takes it has to let it go on."""
    for number in range(1, CALLS):
        process = Stopped(arguments, number, tmp_path / "told")
        if not process.stopped:
            assert number > 5
            return
        yield process
    raise AssertionError(f"more than {CALLS} calls")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- two that write one file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copy(FIXTURES / "dataparallel.pt", tmp_path / "in.pt"))


def made(tmp_path: Path, source: Path, *arguments: str) -> bytes:
    out = tmp_path / "expected.pt"
    assert run(arguments[0], source, out, *arguments[1:]).returncode == 0
    data = out.read_bytes()
    out.unlink()
    return data


def test_of_two_that_write_a_new_file_the_second_is_told(source: Path, tmp_path: Path, tally: Any):
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "out.pt"
    first, second = (made(tmp_path, source, verb) for verb in ("strip-prefix", "add-prefix"))
    for process in stopped_at_each(tmp_path, "strip-prefix", source, out):
        other = run("add-prefix", source, out)
        code, told = process.go_on()
        assert sorted([code, other.returncode]) == [0, 2]
        assert "is there already" in (told if code else other.stderr)
        assert out.read_bytes() == (second if code else first)
        assert names(folder) == ["out.pt"]
        out.unlink()
        tally("races for one file")


def test_of_two_that_replace_a_file_the_last_wins(source: Path, tmp_path: Path, tally: Any) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "out.pt"
    both = [made(tmp_path, source, verb) for verb in ("strip-prefix", "add-prefix")]
    for process in stopped_at_each(tmp_path, "strip-prefix", source, out, "--force"):
        assert run("add-prefix", source, out, "--force").returncode == 0
        assert process.go_on()[0] == 0
        assert out.read_bytes() in both
        assert names(folder) == ["out.pt"]
        tally("races for one file")


def test_of_two_that_write_shards_one_is_whole(tmp_path: Path, tally: Any) -> None:
    source, folder = tmp_path / "in.pt", tmp_path / "shards"
    torch.save({f"layers.{index}.weight": torch.rand(20, 20) for index in range(4)}, source)
    wanted = torch.load(source)
    convert = ["convert", source, folder, "--max-shard-size", "2KB"]
    other = ["convert", source, folder, "--max-shard-size", "4KB", "--force"]
    for process in stopped_at_each(tmp_path, *convert, "--force"):
        ran = run(*other)
        code, told = process.go_on()
        assert sorted([code, ran.returncode]) in ([0, 0], [0, 2])
        assert "is being changed by another process" in told + ran.stderr or code == 0
        assert "Traceback" not in told + ran.stderr
        assert unlike(dict(ckptfix.load_state_dict(folder)), wanted) is None
        shutil.rmtree(folder)
        tally("races for one folder")


# --- two that edit one file in place


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    folder = tmp_path / "edited"
    folder.mkdir()
    return Path(shutil.copy(TRAINING, folder / "in.pt"))


def after(path: Path, *verbs: str) -> bytes:
    """What edits one after another make of a file, which stays as it is."""
    copy = path.parent / "copy.pt"
    shutil.copy(path, copy)
    for verb in verbs:
        assert run(verb, copy, "--in-place").returncode == 0
    data = copy.read_bytes()
    copy.unlink()
    return data


def test_of_two_edits_in_place_one_is_told_or_both_are_made(
    edited: Path, tmp_path: Path, tally: Any
) -> None:
    old = edited.read_bytes()
    first, second = after(edited, "to-cpu"), after(edited, "strip-prefix")
    both = (after(edited, "to-cpu", "strip-prefix"), after(edited, "strip-prefix", "to-cpu"))
    for process in stopped_at_each(tmp_path, "to-cpu", edited, "--in-place"):
        other = run("strip-prefix", edited, "--in-place")
        code, told = process.go_on()
        assert "Traceback" not in told + other.stderr
        outcome = (code, other.returncode)
        expected = {(0, 2): (first,), (2, 0): (second,), (0, 0): both}[outcome]
        assert edited.read_bytes() in expected
        assert names(edited.parent) == ["in.pt"]
        edited.write_bytes(old)
        tally(f"edits in place, exit codes {outcome}")


@pytest.mark.parametrize("verb", ["inspect", "check"])
def test_a_reader_during_an_edit_sees_the_old_file_or_the_new_or_is_told(
    verb: str, edited: Path, tmp_path: Path, tally: Any
) -> None:
    old, new = edited.read_bytes(), after(edited, "strip-prefix")
    answers = {run(verb, edited, "--json").stdout}
    edited.write_bytes(new)
    answers.add(run(verb, edited, "--json").stdout)
    edited.write_bytes(old)
    for process in stopped_at_each(tmp_path, "strip-prefix", edited, "--in-place"):
        busy = os.path.exists(journal.beside(edited))
        reader = run(verb, edited, "--json")
        assert process.go_on()[0] == 0
        assert edited.read_bytes() == new
        if reader.returncode == 2:
            assert busy
            assert "is being changed by another process" in reader.stderr
            tally("readers told that the file is in use")
        else:
            assert reader.stdout in answers
            tally("readers that read")
        edited.write_bytes(old)


def test_weights_that_are_loaded_stay_what_they_are_during_an_edit(
    edited: Path, tmp_path: Path
) -> None:
    loaded = ckptfix.load(edited)
    before = torch.load(edited, map_location="cpu", weights_only=False)
    assert run("strip-prefix", edited, "--in-place").returncode == 0
    assert unlike(loaded, before) is None


# --- an input that changes while it is copied


def test_an_input_that_is_replaced_meanwhile_is_copied_as_it_was(
    source: Path, tmp_path: Path, tally: Any
) -> None:
    out, other, kept = (tmp_path / name for name in ("out.pt", "other.pt", "kept.pt"))
    shutil.copy(source, kept)
    expected = made(tmp_path, source, "strip-prefix")
    for process in stopped_at_each(tmp_path, "strip-prefix", source, out):
        shutil.copy(FIXTURES / "cpu.pt", other)
        os.replace(other, source)
        assert process.go_on()[0] == 0
        assert out.read_bytes() == expected
        out.unlink()
        shutil.copy(kept, source)
        tally("inputs replaced")


def test_an_input_that_becomes_shorter_meanwhile_is_an_error(tmp_path: Path) -> None:
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"module.w": torch.rand(1000, 1000), "module.v": torch.rand(1000, 100)}, source)
    whole = source.read_bytes()
    for process in stopped_at_each(tmp_path, "strip-prefix", source, out):
        os.truncate(source, 5000)
        code, told = process.go_on()
        assert "Traceback" not in told
        if code:
            assert (code, out.exists()) == (2, False)
            assert told.startswith("error: ")
        else:
            source.write_bytes(whole)
            found, wanted = door.read(out), ckptfix.open(source).strip_prefix().document
            assert difference(wanted.root, found.root) is None
            assert (
                unlike(dict(torch.load(out)), dict(ckptfix.strip_prefix(torch.load(source))))
                is None
            )
        out.unlink(missing_ok=True)
        source.write_bytes(whole)
