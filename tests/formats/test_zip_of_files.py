"""Zip archives that are no checkpoints: what is packed into them, and those of other programs."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.package import package_exporter as package

import ckptfix
from ckptfix import door
from ckptfix.errors import NotACheckpointError, ReadError, UnsafeError

if TYPE_CHECKING:
    from pathlib import Path

NET = nn.Linear(3, 2)


def saved(value: object, **options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, **options)
    return made.getvalue()


WEIGHTS = NET.state_dict()
MEMBERS = {
    "torch zip": saved(WEIGHTS),
    "legacy": saved(WEIGHTS, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(WEIGHTS),
}


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("container", MEMBERS)
def test_the_one_checkpoint_in_a_zip_is_read(container: str, method: int, tmp_path: Path) -> None:
    others = {"MAR-INF/MANIFEST.json": b"{}", "__MACOSX/._model.pt": b"\0\x05\x16\x07"}
    path = pack(tmp_path / "model.mar", {**others, "model.pt": MEMBERS[container]}, method)
    assert same(ckptfix.load_state_dict(path), WEIGHTS)
    codes = [note.code for note in door.read(path).notes]
    assert "container-refused" in codes
    assert run("fix", path, tmp_path / "out.pt").returncode == 0
    assert same(torch.load(tmp_path / "out.pt"), WEIGHTS)


def test_several_are_a_mapping_of_their_names(tmp_path: Path) -> None:
    """As stable-baselines3 packs a policy and its optimizer."""
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights = net.state_dict()
    members = {
        "data": b'{"policy_class": "x"}',
        "pytorch_variables.pth": saved({}),
        "policy.pth": saved(weights),
        "policy.optimizer.pth": saved(optimizer.state_dict()),
        "extra/critic.pth": saved({"w": torch.ones(2)}),
    }
    path = pack(tmp_path / "agent.zip", members)
    document = door.read(path)
    assert list(document.root) == [*list(members)[1:4], "extra"]
    assert same(ckptfix.load_state_dict(path, select="policy.pth"), weights)
    assert list(ckptfix.load_state_dict(path, select="extra/critic.pth")) == ["w"]
    done = run("convert", path, tmp_path / "all.pt")
    assert done.returncode == 0, done.stderr
    held = torch.load(tmp_path / "all.pt")
    assert same(held["policy.pth"], weights)
    assert held["policy.optimizer.pth"]["state"][0]["step"] == 1


def test_an_archive_in_an_archive_in_an_archive_is_refused(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.zip", {"model.pt": MEMBERS["torch zip"]})
    outer = pack(tmp_path / "outer.zip", {"inner.pt": inner.read_bytes()})
    with pytest.raises(ReadError):
        door.read(outer)


def test_what_unpacks_to_more_than_a_file_may_ask_for_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "bomb.zip", {"model.pt": MEMBERS["legacy"], "zeros": bytes(300 << 20)})
    with pytest.raises(UnsafeError, match="of zip unpack to"):
        door.read(path)


def test_what_is_packed_twice_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(MEMBERS["torch zip"])) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path = pack(tmp_path / "twice.zip", {"model.pt": packed.getvalue()})
    with pytest.raises(UnsafeError, match="packed twice"):
        door.read(path)


@pytest.mark.parametrize("cut", range(0, len(MEMBERS["torch zip"]), 97))
def test_a_damaged_member_is_an_error(cut: int, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"model.pt": MEMBERS["torch zip"][:cut]})
    with pytest.raises(ReadError):
        door.read(path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def exported(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Net(), (torch.ones(1, 2),)), path)


def arrays(save: Any) -> bytes:
    made = io.BytesIO()
    save(made, a=np.ones(3))
    return made.getvalue()


def packaged(path: Path) -> None:
    with warnings.catch_warnings(), package.PackageExporter(path) as exporter:
        warnings.simplefilter("ignore")
        exporter.extern("**")
        exporter.save_pickle("model", "model.pkl", {"w": torch.ones(2)})


OTHERS: dict[str, tuple[str, Any]] = {
    "npz": ("numpy arrays", lambda path: path.write_bytes(arrays(np.savez))),
    "packed npz": ("numpy arrays", lambda path: path.write_bytes(arrays(np.savez_compressed))),
    "pt2": ("torch.export", exported),
    "package": ("torch.package", packaged),
    "old pt2": (
        "torch.export",
        lambda path: pack(
            path, {"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": b""}
        ),
    ),
    "compiled": ("AOTInductor", lambda path: pack(path, {"m/data/aotinductor/model/x.so": b""})),
    "Keras": ("Keras", lambda path: pack(path, {"config.json": b"{}", "model.weights.h5": b""})),
    "wheel": ("wheel", lambda path: pack(path, {"x/model.py": b"", "x-1.dist-info/RECORD": b""})),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_archive_of_another_program_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    words, write = OTHERS[kind]
    path = tmp_path / "model.pt"
    write(path)
    for read in (door.read, door.salvage):
        with pytest.raises(NotACheckpointError, match=words) as caught:
            read(path)
        assert "{" not in str(caught.value.hint)


def test_recover_takes_a_checkpoint_out_of_a_zip(tmp_path: Path) -> None:
    path = pack(tmp_path / "model.pth.zip", {"model.pth": MEMBERS["torch zip"]})
    assert run("recover", path, tmp_path / "out.pt").returncode == 0
    assert same(torch.load(tmp_path / "out.pt"), WEIGHTS)
