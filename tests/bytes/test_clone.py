"""Outputs that share the blocks of their inputs: on file systems that can, and elsewhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from ckptfix.bytes import clone
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import FileSource
from ckptfix.errors import ReadError, VerifyError, WriteError
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done, unlike
from tests.sharing import KINDS, mounted, written_sectors

if TYPE_CHECKING:
    from collections.abc import Iterator

fcntl = pytest.importorskip("fcntl")

MIB = 1 << 20


@pytest.fixture(scope="module", params=KINDS)
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    with mounted(request.param, tmp_path_factory.mktemp("disk")) as place:
        yield place


@pytest.fixture
def folder(disk: Path) -> Iterator[Path]:
    made = disk / "folder"
    made.mkdir()
    yield made
    for path in made.iterdir():
        path.unlink()
    made.rmdir()


def saved(path: Path, mib: int = 32) -> dict[str, torch.Tensor]:
    """A checkpoint of so many MiB, saved under DataParallel."""
    weights = {f"module.{i}.weight": torch.randn(MIB) for i in range(mib // 4)}
    torch.save(OrderedDict(weights), path)
    os.sync()
    return weights


def names_of(weights: dict[str, torch.Tensor], edit: str) -> dict[str, torch.Tensor]:
    if edit == "rename":
        return {key.removesuffix("eight"): value for key, value in weights.items()}
    return {key.removeprefix("module."): value for key, value in weights.items()}


EDITS = {
    "strip-prefix": ["strip-prefix"],
    "rename": ["rename", "--sub", "weight", "w"],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("extension", [".pt", ".safetensors"])
def test_an_edit_of_names_shares_the_blocks_and_says_so(
    edit: str, extension: str, folder: Path
) -> None:
    weights = saved(folder / "in.pt")
    source, out = folder / f"in{extension}", folder / f"out{extension}"
    if extension != ".pt":
        done("convert", folder / "in.pt", source)
    os.sync()
    before, data = written_sectors(folder.parent), source.read_bytes()
    answer = json.loads(done(*EDITS[edit], source, out, "--json"))
    os.sync()
    assert answer["bytes"] == "shared"
    assert (written_sectors(folder.parent) - before) * 512 < 8 * MIB
    assert source.read_bytes() == data
    assert unlike(dict(ckptfix.load(out)), names_of(weights, edit)) is None
    assert ckptfix_command("check", "--read-data", out).returncode == 0


def test_an_edit_of_tags_shares_the_blocks(folder: Path) -> None:
    source = Path(shutil.copy(FIXTURES / "dataparallel_cuda_training.pt", folder))
    assert json.loads(done("to-cpu", source, folder / "out.pt", "--json"))["bytes"] == "shared"
    assert unlike(torch.load(folder / "out.pt"), torch.load(source, map_location="cpu")) is None


def test_what_is_called_repaired_was_read(folder: Path) -> None:
    saved(folder / "in.pt")
    answer = json.loads(done("fix", folder / "in.pt", folder / "out.pt", "--json"))
    assert answer["bytes"] == "checked"


def test_a_clone_is_a_file_of_its_own(folder: Path) -> None:
    weights = saved(folder / "in.pt")
    ran = ckptfix_command("strip-prefix", "in.pt", "out.pt", cwd=folder)
    assert ran.stdout.endswith("; bytes shared, not read\n")
    with (folder / "in.pt").open("r+b") as file:
        file.write(b"other bytes")
        file.truncate(100)
    loaded = torch.load(folder / "out.pt")
    named = {key.removeprefix("module."): value for key, value in weights.items()}
    assert unlike(dict(loaded), named) is None


def test_damage_is_not_read_and_stays_visible_and_verify_reads(folder: Path) -> None:
    weights = saved(folder / "in.pt")
    data = bytearray((folder / "in.pt").read_bytes())
    data[data.find(weights["module.3.weight"].numpy().tobytes()) + 9] ^= 1
    (folder / "in.pt").write_bytes(data)
    ran = ckptfix_command("strip-prefix", "in.pt", "out.pt", cwd=folder)
    assert (ran.returncode, "shared, not read" in ran.stdout) == (0, True)
    told = ckptfix_command("check", "--read-data", "out.pt", cwd=folder)
    assert (told.returncode, "3.weight" in told.stdout) == (1, True)
    ran = ckptfix_command("strip-prefix", "in.pt", "verified.pt", "--verify", cwd=folder)
    assert (ran.returncode, "(3.weight)" in ran.stderr) == (2, True)
    assert not (folder / "verified.pt").exists()


def test_verified_outputs_are_copies(folder: Path) -> None:
    saved(folder / "in.pt")
    answer = json.loads(done("strip-prefix", "in.pt", "out.pt", "--verify", "--json", cwd=folder))
    assert answer["bytes"] == "verified"


def test_an_edit_that_needs_room_is_copied(folder: Path) -> None:
    weights = saved(folder / "in.pt")
    out = folder / "out.pt"
    answer = json.loads(done("add-prefix", folder / "in.pt", out, "--prefix", "a" * 400, "--json"))
    assert answer["bytes"] == "checked"
    assert list(torch.load(out)) == [f"{'a' * 400}.{key}" for key in weights]


def test_an_output_on_another_file_system_is_copied(folder: Path, tmp_path: Path) -> None:
    saved(folder / "in.pt")
    answer = json.loads(done("strip-prefix", folder / "in.pt", tmp_path / "out.pt", "--json"))
    assert answer["bytes"] == "checked"
    assert (
        ckptfix_command("diff", folder / "in.pt", tmp_path / "out.pt", "--read-data").returncode
        == 1
    )


# --- where something goes wrong

WITH = """
import errno, fcntl, os, sys
from ckptfix.cli import main
def ioctl(target, request, source):
    {0}
fcntl.ioctl = ioctl
main()
"""


def run_with(body: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITH.format(body), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "code", ["EOPNOTSUPP", "EXDEV", "EINVAL", "EPERM", "ENOSPC", "EIO", "ENOTTY"]
)
def test_a_system_that_cannot_clone_copies(code: str, tmp_path: Path) -> None:
    weights = saved(tmp_path / "in.pt", 4)
    body = f"os.pwrite(target, b'half of it', 0); raise OSError(errno.{code}, 'no')"
    ran = run_with(body, "strip-prefix", tmp_path / "in.pt", tmp_path / "out.pt", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["bytes"] == "checked"
    assert list(torch.load(tmp_path / "out.pt")) == [key.removeprefix("module.") for key in weights]
    plain = ckptfix.open(tmp_path / "in.pt").strip_prefix()
    plain.save(tmp_path / "plain.pt")
    assert (tmp_path / "plain.pt").read_bytes() == (tmp_path / "out.pt").read_bytes()


LIES = {
    "nothing": "pass",
    "zeros": "os.ftruncate(target, os.fstat(source).st_size)",
    "too short": "os.pwrite(target, os.pread(source, 1 << 20, 0), 0)",
    "too long": "d = os.pread(source, 1 << 30, 0); os.pwrite(target, d + b'x', 0)",
    "another end": "d = os.pread(source, 1 << 30, 0); os.pwrite(target, d[:-9] + b'123456789', 0)",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_system_that_says_it_cloned_and_did_not_is_an_error(lie: str, tmp_path: Path) -> None:
    saved(tmp_path / "in.pt", 4)
    ran = run_with(LIES[lie], "strip-prefix", tmp_path / "in.pt", tmp_path / "out.pt")
    assert ran.returncode == 2
    assert "though the file system said that it shares them" in ran.stderr
    assert "hint: write to another file system" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_every_place_of_a_small_file_is_looked_at(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    (tmp_path / "source").write_bytes(data)
    source = FileSource(tmp_path / "source")
    with (tmp_path / "target").open("w+b") as target:
        for place in range(0, len(data), 1999):
            other = bytearray(data)
            other[place] ^= 1
            os.pwrite(target.fileno(), other, 0)
            assert not clone.is_same(source, target.fileno())
        os.pwrite(target.fileno(), data, 0)
        assert clone.is_same(source, target.fileno())


def test_a_file_that_changes_while_it_is_cloned_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "in.pt", 4)

    def ioctl(target: int, _: int, source: int) -> None:
        os.utime(tmp_path / "in.pt", ns=(1, 1))
        os.pwrite(target, os.pread(source, 1 << 30, 0), 0)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(ReadError, match="was changed while it was read"):
        ckptfix.open(tmp_path / "in.pt").strip_prefix().save(tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link"])
def test_a_disk_that_fails_while_a_clone_is_edited_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "in.pt", 4)
    before, real = (tmp_path / "in.pt").read_bytes(), os.pwrite

    def ioctl(target: int, _: int, source: int) -> None:
        real(target, os.pread(source, 1 << 30, 0), 0)

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(os, call, fails)
    if call == "link":
        monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(WriteError, match="no space left"):
        ckptfix.open(tmp_path / "in.pt").strip_prefix().save(tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]
    assert (tmp_path / "in.pt").read_bytes() == before


def test_a_sink_that_was_a_clone_can_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_bytes(bytes(100))

    def ioctl(target: int, _: int, source: int) -> None:
        os.pwrite(target, os.pread(source, 100, 0), 0)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with Place(tmp_path / "out").publish() as sink:
        assert sink.clone(FileSource(tmp_path / "in"))
        assert (sink.position, sink.result) == (100, "shared")
        sink.restart()
        sink.write(b"other")
    assert (tmp_path / "out").read_bytes() == b"other"
    assert sink.result == "checked"
    monkeypatch.setattr(clone, "is_same", lambda *_: False)
    with pytest.raises(VerifyError), Place(tmp_path / "another").publish() as sink:
        sink.clone(FileSource(tmp_path / "in"))
