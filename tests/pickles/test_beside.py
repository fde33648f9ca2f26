"""Injected calls: unpicklers take the topmost value, and what lies beside it is told."""

from __future__ import annotations

import argparse
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix.errors import ReadError
from ckptfix.pickles import read

if TYPE_CHECKING:
    from ckptfix.findings import Finding

CALL = b"cos\nsystem\n(X\x07\0\0\0touch xtR"
LEFTOVERS = [
    b"K\x07K\x08.", b"]K\x01.", b"(K\x01(K\x02K\x03.", b"\x80\x04NK\x05.",
    b"\x80\x04\x95\x05\0\0\0\0\0\0\0K\x01K\x02.", b"X\x01\0\0\0a}q\0.", b"I1\nI2\n.",
]  # fmt: skip


class Outer:
    class Inner:
        pass


def notes(data: bytes) -> list[Finding]:
    found: list[Finding] = []
    read(data, lambda pid: pid, name="x", notes=found)
    return found


def codes(path: Path) -> set[str]:
    return {finding.code for finding in ckptfix.open(path).findings}


@pytest.mark.parametrize("data", LEFTOVERS)
def test_the_topmost_value_counts_as_it_does_for_python(data: bytes) -> None:
    root, end = read(data, lambda pid: pid, name="x")
    assert (root, end) == (pickle.loads(data), len(data))
    assert [note.code for note in notes(data)] == ["left-on-stack"]


def test_a_mark_that_is_left_is_no_value() -> None:
    assert read(b"(K\x01.", lambda pid: pid, name="x") == (pickle.loads(b"(K\x01."), 4)
    assert notes(b"(K\x01.") == []


@pytest.mark.parametrize("data", [b".", b"(.", b"K\x01(.", b"K\x010."])
def test_where_nothing_is_on_top_there_is_nothing(data: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, EOFError, IndexError)):
        pickle.loads(data)
    with pytest.raises(ReadError):
        read(data, lambda pid: pid, name="x")


@pytest.mark.parametrize("after", [b"", b"0", b"q\x070", b"1"])
@pytest.mark.parametrize("value", [{"w": 1}, [2, (3, 4)], argparse.Namespace(lr=0.1)])
def test_a_call_that_is_no_part_of_the_tree_is_told(after: bytes, value: Any) -> None:
    whole = pickle.dumps(value, 2)
    call = b"(" + CALL if after == b"1" else CALL
    injected = whole[:2] + call + after + whole[2:]
    (note,) = notes(injected)
    assert note.code == "hidden-call"
    assert "os.system" in note.message
    assert notes(whole) == []


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_itself_writes_holds_no_such_call(protocol: int) -> None:
    again: list[Any] = []
    again.append((again, {1, 2}, frozenset([3]), b"\xff", bytearray(b"x"), range(3), 1j))
    for value in ([Outer.Inner, Outer.Inner(), Outer], again, torch.Size([1]), Path("x")):
        assert notes(pickle.dumps(value, protocol)) == []


# --- in every container

WEIGHTS = {"w": torch.arange(4.0), "b": torch.ones(2)}


def injected(pickled: bytes, call: bytes) -> bytes:
    """A call in front of the last pickle in some bytes that holds a global."""
    at = pickled.rindex(b"\x80\x02", 0, pickled.index(b"ctorch")) + 2
    return pickled[:at] + call + pickled[at:]


def write(path: Path, container: str, call: bytes) -> Path:
    if container == "legacy":
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
        path.write_bytes(injected(path.read_bytes(), call))
    elif container == "zip":
        torch.save(WEIGHTS, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                changed = injected(data, call) if name.endswith(".pkl") else data
                archive.writestr(name, changed)
    else:
        arrays = pickle.dumps({key: value.numpy() for key, value in WEIGHTS.items()}, 2)
        path.write_bytes(arrays[:2] + call + arrays[2:])
    return path


@pytest.mark.parametrize("call", [CALL, CALL + b"0"], ids=["left", "popped"])
@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_injected_code_is_told_and_left_behind(
    container: str, call: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "in.pt", container, call)
    assert "hidden-call" in codes(path)
    fix = [sys.executable, "-m", "ckptfix", "fix", "in.pt", "out.pt"]
    done = subprocess.run(fix, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "os.system" in done.stderr
    assert "nothing left behind" not in done.stdout
    assert codes(tmp_path / "out.pt").isdisjoint({"hidden-call", "left-on-stack"})
    loaded = torch.load(tmp_path / "out.pt", weights_only=container != "plain")
    assert all(torch.equal(torch.as_tensor(loaded[key]), WEIGHTS[key]) for key in WEIGHTS)
    assert b"system" not in (tmp_path / "out.pt").read_bytes()
    assert not (tmp_path / "x").exists()


def test_a_value_that_is_left_is_told_and_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "in.pt", "zip", b"K\x07")
    assert torch.equal(torch.load(path, weights_only=True)["w"], WEIGHTS["w"])
    assert torch.equal(ckptfix.load(path)["w"], WEIGHTS["w"])
    assert codes(path) == {"left-on-stack"}
    ckptfix.open(path).save(tmp_path / "out.pt")
    assert codes(tmp_path / "out.pt") == set()


def test_a_call_in_the_header_of_an_old_tar_is_told(tmp_path: Path) -> None:
    storages = pickle.dumps(0, 2)
    members = {"sys_info": pickle.dumps({}, 2), "pickle": pickle.dumps({"a": 1}, 2),
               "storages": storages[:2] + CALL + storages[2:]}  # fmt: skip
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    assert "hidden-call" in codes(tmp_path / "in.tar")
