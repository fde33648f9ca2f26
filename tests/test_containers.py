"""What torch refuses of a container is a finding, and only that; `fix` packs it as torch does.

The oracle is `torch.load`: of each way to pack a checkpoint, it says whether it takes it.
"""

from __future__ import annotations

import gzip
import json
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
Row = tuple[str, bytes]


def rows(folder: Path) -> list[Row]:
    """The records of a checkpoint, without their folder."""
    torch.save(WEIGHTS, folder / "whole.pt")
    with zipfile.ZipFile(folder / "whole.pt") as archive:
        return [(name.split("/", 1)[1], archive.read(name)) for name in archive.namelist()]


def below(folder: str, records: Sequence[Row]) -> list[Row]:
    return [(folder + name, data) for name, data in records]


def stating(version: bytes, records: Sequence[Row]) -> list[Row]:
    return [(name, version if name == "version" else data) for name, data in records]


def renamed(old: str, new: str, records: Sequence[Row]) -> list[Row]:
    return [(new if name == old else name, data) for name, data in records]


def without(record: str, records: Sequence[Row]) -> list[Row]:
    return [(name, data) for name, data in records if name != record]


JUNK = ("__MACOSX/in/._data.pkl", b"\0\5\x16\7")
ZIPS: dict[str, Callable[[list[Row]], list[Row]]] = {
    "as it was": lambda r: below("in/", r),
    "another folder": lambda r: below("fü bar/", r),
    "no folder": lambda r: below("", r),
    "folders named": lambda r: [("in/", b""), ("in/data/", b""), *below("in/", r)],
    "macOS, at the end": lambda r: [*below("in/", r), JUNK],
    "macOS, first": lambda r: [JUNK, *below("in/", r)],
    "macOS, amidst, folders named": lambda r: [
        ("in/", b""), *below("in/", r[:1]), ("__MACOSX/", b""), JUNK, *below("in/", r[1:])
    ],
    "a file before": lambda r: [("README.md", b"text"), *below("in/", r)],
    "a file behind": lambda r: [*below("in/", r), ("notes/README.md", b"text")],
    "a file inside": lambda r: [*below("in/", r), ("in/README.md", b"text")],
    "Finder's file": lambda r: [(".DS_Store", b"\0"), *below("in/", r)],
    "a folder deeper": lambda r: below("runs/in/", r),
    "from the root": lambda r: below("/in/", r),
    "a dot before": lambda r: below("./in/", r),
    "a dot": lambda r: below("./", r),
    "the pickle last": lambda r: below("in/", [*r[1:], r[0]]),
    "no version": lambda r: below("in/", without("version", r)),
    "no byteorder": lambda r: below("in/", without("byteorder", r)),
    "an older version": lambda r: below("in/", stating(b"1\n", r)),
    "a version of nothing": lambda r: below("in/", stating(b"", r)),
    "a version of text": lambda r: below("in/", stating(b"new", r)),
    "a version to come": lambda r: below("in/", stating(b"999\n", r)),
    "the version's old place": lambda r: below("in/", renamed("version", ".data/version", r)),
    "the version in capitals": lambda r: below("in/", renamed("version", "VERSION", r)),
}  # fmt: skip


def torch_takes(path: Path, **options: Any) -> bool:
    try:
        torch.load(path, **options)
    except Exception:  # noqa: BLE001 - whatever torch raises
        return False
    return True


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def codes(path: Path) -> list[str]:
    return [finding.code for finding in ckptfix.open(path).findings]


def is_repaired(path: Path, out: Path) -> None:
    """`fix` writes what torch takes, and so does the command of the finding."""
    done = run("fix", "--json", path, out)
    assert done.returncode == 0, done.stderr
    assert "container-refused" in [row["code"] for row in json.loads(done.stdout)["plan"]]
    (finding,) = [f for f in ckptfix.open(path).findings if "container" in f.code]
    assert finding.command is not None
    done = run(*str(finding.command).split()[1:])
    assert done.returncode == 0, done.stderr
    for made in (out, Path(finding.command.arguments[1])):
        loaded = torch.load(made, weights_only=True)
        assert list(loaded) == list(WEIGHTS)
        assert all(torch.equal(torch.as_tensor(loaded[key]), WEIGHTS[key]) for key in WEIGHTS)
        assert codes(made) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("way", ZIPS)
def test_a_zip_that_torch_refuses_is_found_and_repaired(
    way: str, method: int, tmp_path: Path
) -> None:
    path = tmp_path / "in.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in ZIPS[way](rows(tmp_path)):
            archive.writestr(name, data)
    if torch_takes(path, weights_only=True):
        assert codes(path) == []
        done = run("fix", path, tmp_path / "out.pt")
        assert (done.returncode, "nothing had to be repaired" in done.stdout) == (0, True)
        assert run("check", path).returncode == 0
    else:
        assert codes(path) == ["container-refused"]
        checked = run("check", path)
        assert (checked.returncode, "container-refused" in checked.stdout) == (1, True)
        held = run("check", path, "--like", tmp_path / "whole.pt")
        assert (held.returncode, "matches" in held.stdout) == (1, True)
        is_repaired(path, tmp_path / "out.pt")


def in_a_tar(path: Path, mode: Any) -> None:
    with tarfile.open(path, mode) as archive:
        archive.add(path.parent / "whole.pt", "run/whole.pt")
        archive.add(__file__, "run/README")


def in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress((path.parent / "whole.pt").read_bytes()))


PACKED: dict[str, Callable[[Path], None]] = {
    "x.tar": lambda path: in_a_tar(path, "w"),
    "x.tar.gz": lambda path: in_a_tar(path, "w:gz"),
    "tar.pt": lambda path: in_a_tar(path, "w"),
    "x.pt.gz": in_gzip,
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_what_lies_around_a_checkpoint_is_found_and_taken_off(name: str, tmp_path: Path) -> None:
    rows(tmp_path)
    PACKED[name](tmp_path / name)
    assert not torch_takes(tmp_path / name, weights_only=False)
    assert codes(tmp_path / name) == ["container-refused"]
    is_repaired(tmp_path / name, tmp_path / "out.pt")


@pytest.mark.parametrize("top", ["", "in/"])
def test_an_archive_that_was_unpacked_is_found_and_packed(top: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, data in below(top, rows(tmp_path)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._data.pkl").write_bytes(b"\0\5")
    if top:  # what lies beside the folder of the archive is no part of it
        (folder / "large.bin").write_bytes(bytes(1 << 20))
    assert not torch_takes(folder, weights_only=False)
    assert codes(folder) == ["container-refused"]
    is_repaired(folder, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").stat().st_size < 1 << 16


def test_a_pickle_without_a_container_is_found_and_given_one(tmp_path: Path) -> None:
    arrays = {"w": WEIGHTS["w"].numpy()}
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(arrays))
    assert not torch_takes(tmp_path / "in.pkl", weights_only=False)
    assert codes(tmp_path / "in.pkl")[0] == "container-refused"
    assert run("fix", tmp_path / "in.pkl", tmp_path / "out.pt").returncode == 0
    assert torch_takes(tmp_path / "out.pt", weights_only=False)


def test_what_torch_takes_has_no_such_finding(checkpoint: Path) -> None:
    if checkpoint.suffix == ".pt":
        assert not {"container-refused", "old-container"}.intersection(codes(checkpoint))


def test_a_zip_of_two_checkpoints_is_refused_and_both_are_named(tmp_path: Path) -> None:
    records = rows(tmp_path)
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        for name, data in [*below("first/", records), *below("second/", records)]:
            archive.writestr(name, data)
    done = run("inspect", tmp_path / "two.pt")
    assert done.returncode == 2
    assert "2 checkpoints (first/, second/)" in done.stderr
    assert "hint: " in done.stderr


def test_a_zip_around_a_checkpoint_is_read_and_said_to_be_one(tmp_path: Path) -> None:
    rows(tmp_path)
    with zipfile.ZipFile(tmp_path / "around.zip", "w") as archive:
        archive.write(tmp_path / "whole.pt", "run/whole.pt")
    done = run("inspect", tmp_path / "around.zip")
    assert done.returncode == 0
    assert "container-refused: it is packed with zip" in done.stdout


def test_names_in_a_folder_that_torch_does_not_take_cannot_be_changed_in_place(
    tmp_path: Path,
) -> None:
    torch.save({f"module.{key}": value for key, value in WEIGHTS.items()}, tmp_path / "in.pt")
    with (
        zipfile.ZipFile(tmp_path / "in.pt") as old,
        zipfile.ZipFile(tmp_path / "deep.pt", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(f"runs/{name}", old.read(name))
    done = run("strip-prefix", "--in-place", tmp_path / "deep.pt")
    assert done.returncode == 2, done.stdout
    assert "cannot be changed in place" in done.stderr


def test_a_version_in_capitals_is_the_version(tmp_path: Path) -> None:
    """torch finds it, so there is one of it in what is written, and in what is changed in place."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ZIPS["the version in capitals"](rows(tmp_path)):
            archive.writestr(name, data)
    assert torch_takes(path)
    assert run("convert", path, out).returncode == 0
    with zipfile.ZipFile(out) as archive:
        assert [name for name in archive.namelist() if name.lower().endswith("version")] == [
            "in/.format_version", "in/version",
        ]  # fmt: skip
    assert run("add-prefix", path, "--in-place").returncode == 0
    assert list(torch.load(path)) == [f"module.{key}" for key in WEIGHTS]
