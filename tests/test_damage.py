"""Every container, cut at random points and with single bytes changed, through the commands.

Nothing ends in a traceback; where a container has checksums, `check --read-data` and `fix` tell of
every change, or it is one that changes nothing; `recover` saves every tensor that is whole.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from ckptfix import door
from ckptfix.cli import group
from ckptfix.diagnose import damage
from ckptfix.errors import CkptfixError
from tests.formats import test_torch_tar as tar
from tests.oracles import bits, has_a_reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAMES = [f"module.layer{index}.weight" for index in range(6)]
KINDS = ["zip", "zip without checksums", "legacy", "tar", "pickle", "safetensors", "sharded"]
QUICK, FULL = 40, 200
SEED = 7


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(20, 10, generator=generator) for name in NAMES}


ORIGINAL = {name: bits(tensor) for name, tensor in weights().items()}


def make(folder: Path, kind: str) -> Path:
    """A checkpoint of that kind: a file, or a folder of three."""
    path = folder / "whole"
    if kind == "sharded":
        return sharded(path)
    if kind == "safetensors":
        safetensors.torch.save_file(weights(), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(weights(), 2))
    elif kind == "tar":
        in_tar(path)
    else:
        torch.serialization.set_crc32_options(kind == "zip")
        try:
            torch.save(weights(), path, _use_new_zipfile_serialization=kind != "legacy")
        finally:
            torch.serialization.set_crc32_options(True)
    return path


def sharded(folder: Path) -> Path:
    folder.mkdir()
    weight_map = {}
    for number in (1, 2):
        part = f"model-{number:05d}-of-00002.safetensors"
        held = dict(list(weights().items())[3 * number - 3 : 3 * number])
        safetensors.torch.save_file(held, folder / part)
        weight_map.update(dict.fromkeys(held, part))
    index = {"metadata": {"total_size": 4800}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def in_tar(path: Path) -> Path:
    """The members in the order in which torch wrote them: what describes comes first."""
    count = pickle.dumps(len(NAMES), 2)
    storages, tensors = count, count
    for key, tensor in enumerate(weights().values()):
        storages += pickle.dumps((key, "cpu", torch.FloatStorage), 2)
        storages += struct.pack("<q", tensor.numel()) + bits(tensor)
        tensors += pickle.dumps((100 + key, key, torch.FloatTensor), 2)
        tensors += struct.pack("<2i5q", 2, 0, *tensor.shape, *tensor.stride(), 0)
    tree = tar.tree({name: tar.Kept(100 + key) for key, name in enumerate(NAMES)})
    views = pickle.dumps([], 2)
    return tar.write(path, pickle=tree, tensors=tensors, storages=storages + views)


# --- the commands, and what they say


def told(*arguments: object) -> int:
    """The exit code of a command; what it raises beside its own errors is a traceback."""
    try:
        return group.main(list(map(str, arguments)), standalone_mode=False) or 0
    except CkptfixError as error:
        has_a_reason(error)
        return 2


def loaded(path: Path) -> dict[str, bytes]:
    """The tensors in a file by name; none where damage made an object of another class of one."""
    try:
        found: Any = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {name: bits(value) for name, value in items if isinstance(value, torch.Tensor)}


def recovered(path: Path, out: Path) -> dict[str, bytes]:
    """What `recover` saves, by name; nothing where it refuses."""
    out.unlink(missing_ok=True)
    code = told("recover", path, out)
    assert out.exists() == (code != 2)
    return loaded(out) if code != 2 else {}


def is_damaged(path: Path) -> bool:
    """Whether it cannot be read, or has other bytes than those that were saved."""
    try:
        return not damage.read_data(door.read(path)).is_sound
    except CkptfixError:
        return True


def is_silent(path: Path, out: Path) -> bool:
    """Whether neither `check --read-data` nor `fix` says that something is wrong."""
    out.unlink(missing_ok=True)
    checked = told("check", "--read-data", path)
    fixed = told("fix", path, out)
    assert checked in (0, 1, 2)
    assert out.exists() == (fixed != 2)
    if is_damaged(path):
        assert checked
        assert not out.exists(), "damage that check saw was called repaired"
    return not checked


def stripped(tensors: dict[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix("module."): data for name, data in tensors.items()}


# --- what is done to a checkpoint


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def places(path: Path, count: int) -> Iterator[tuple[Path, int, random.Random]]:
    """Random places in the files of a checkpoint, each as likely as the file is long."""
    rng = random.Random(SEED)
    sizes = [file.stat().st_size for file in files(path)]
    for file in rng.choices(files(path), sizes, k=count):
        yield file, rng.randrange(1, file.stat().st_size), rng


def whole_tensors(file: Path, begin: int, end: int) -> set[str]:
    """Names of the tensors in a file none of whose bytes lie from `begin` to `end`."""
    data = file.read_bytes()
    found = {name: data.find(tensor) for name, tensor in ORIGINAL.items()}
    return {
        name
        for name, place in found.items()
        if place >= 0 and (place >= end or place + len(ORIGINAL[name]) <= begin)
    }


def describes(kind: str, file: Path, place: int) -> bool:
    """Whether a byte belongs to what alone says how the tensors are called and shaped."""
    data = file.read_bytes()
    if kind.startswith("zip"):
        begin = data.find(b"\x80\x02}")
        return begin <= place < data.find(b"PK", begin)
    return not any(
        begin <= place < begin + len(tensor)
        for tensor in ORIGINAL.values()
        if (begin := data.find(tensor)) >= 0
    )


@pytest.fixture(params=[QUICK, pytest.param(FULL, marks=pytest.mark.slow)])
def count(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short(kind: str, count: int, tmp_path: Path, tally: Callable[..., None]) -> None:
    path, out = make(tmp_path, kind), tmp_path / "out.pt"
    for file, size, _ in places(path, count):
        data = file.read_bytes()
        elsewhere = set(NAMES) - whole_tensors(file, 0, 0)
        here = whole_tensors(file, size, len(data))
        file.write_bytes(data[:size])
        if is_silent(path, out):  # what was cut off is the filling after the last byte
            assert kind == "tar", size
            assert loaded(out) == stripped(ORIGINAL), size
        saved = recovered(path, out)
        file.write_bytes(data)
        assert all(saved[name] == ORIGINAL[name] for name in saved), size
        if kind in ("legacy", "tar", "sharded", "safetensors"):
            wanted = elsewhere | (here if file.suffix != ".json" else set())
            assert wanted <= set(saved), size
        tally(f"cut: {kind}")
        tally(f"cut, tensors saved: {kind}", len(saved))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte(kind: str, count: int, tmp_path: Path, tally: Callable[..., None]) -> None:
    path, out = make(tmp_path, kind), tmp_path / "out.pt"
    for file, place, rng in places(path, count):
        data = bytearray(file.read_bytes())
        whole = set(NAMES) - (whole_tensors(file, 0, 0) - whole_tensors(file, place, place + 1))
        fatal = describes(kind, file, place)
        changed = bytearray(data)
        changed[place] ^= rng.randrange(1, 256)
        file.write_bytes(changed)
        if is_silent(path, out):
            tally(f"changed, without effect or not seen: {kind}")
            assert out.exists() or fatal, "a sound file is not repaired"
            seen = loaded(out) if out.exists() else {}  # damaged names may leave nothing to repair
            if kind == "zip":
                assert seen == stripped(ORIGINAL), place
            if not fatal:
                intact = stripped({name: ORIGINAL[name] for name in whole})
                assert {name: seen.get(name) for name in intact} == intact, place
        else:
            tally(f"changed, told of: {kind}")
        saved = recovered(path, out)
        file.write_bytes(data)
        if not fatal:
            assert whole <= set(saved), place
            right = [name for name in saved if saved[name] == ORIGINAL[name]]
            assert whole <= set(right), place
            if kind == "zip":
                assert sorted(right) == sorted(saved), place
        tally(f"changed, tensors saved: {kind}", len(saved))
