"""torch, safetensors and zipfile against ckptfix, on thousands of files, sound and spoiled.

Where they accept a file, ckptfix reads the same from it or refuses it with a reason; what ckptfix
writes, they read. Each file comes from a seed: `spoiled(seed)` makes it again.
"""

from __future__ import annotations

import io
import json
import random
import warnings
import zipfile
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import ckptfix
from ckptfix.bytes.source import FileSource
from ckptfix.errors import CkptfixError
from ckptfix.formats.zip import archive as zips
from tests.oracles import has_a_reason, unlike

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEED = 20_000
QUICK, FULL = 400, 6000
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2]


def tensors(rng: random.Random) -> OrderedDict[str, torch.Tensor]:
    """A small state dict: dtypes, shapes, strides and ties as the generator has it."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    for index in range(rng.randint(1, 5)):
        shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 4))]
        values = torch.randint(0, 2, shape, generator=generator)
        state[f"{rng.choice(['module.', 'ä', ''])}w{index}"] = values.to(rng.choice(DTYPES))
    if rng.random() < 0.3:
        state["tied"] = next(iter(state.values()))
    return state


def saved(rng: random.Random, kind: str) -> bytes:
    """A sound file as torch or safetensors writes it."""
    state = tensors(rng)
    if kind == "safetensors":
        texts = {"format": "pt", "note": "ü"} if rng.random() < 0.5 else None
        state.pop("tied", None)
        return safetensors.torch.save(dict(state), texts)
    beside = {"epoch": 3, "lr": 0.1, "betas": (0.9, 0.99), "steps": [2**40, None, "x"]}
    tree = {"state_dict": state, **beside} if rng.random() < 0.4 else state
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


# --- what may happen to a file


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_early(data: bytes, rng: random.Random) -> bytes:
    """Where the pickle or the header is."""
    return flipped(data[:600], rng) + data[600:]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + bytes(rng.randint(1, 80))


def moved(data: bytes, rng: random.Random) -> bytes:
    """A piece of it lies somewhere else, over something else."""
    length = rng.randint(1, 40)
    begin, end = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[begin : begin + length]
    return data[:end] + piece + data[end + len(piece) :]


def unchanged(data: bytes, rng: random.Random) -> bytes:
    return data


def repacked(data: bytes, rng: random.Random) -> bytes:
    """By zipfile: stored or deflated, in another order, with more records, with comments."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    if rng.random() < 0.4:
        rng.shuffle(records)
    records += rng.choice([[], [], [("archive/extra", b"x")], [("else/readme", b"y")], records[:1]])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are there twice
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in records:
                archive.writestr(name, content, rng.choice([0, 0, 0, zipfile.ZIP_DEFLATED]))
            archive.comment = rng.choice([b"", b"", b"PK\x05\x06 a comment"])
    return buffer.getvalue()


def reworded(data: bytes, rng: random.Random) -> bytes:
    """An edit of the JSON header of a safetensors file, of one number or word."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    edits: list[Callable[[], Any]] = [
        lambda: entry.update(shape=[*entry["shape"], rng.choice([1, 2, 0, -1, 2**63, 1.0])]),
        lambda: entry.update(dtype=rng.choice(["F64", "F4", "I9", "U16", "", None, 7])),
        lambda: entry.update(data_offsets=[entry["data_offsets"][0], rng.randrange(99)]),
        lambda: entry.update(data_offsets=entry["data_offsets"][::-1]),
        lambda: entry.pop(rng.choice(list(entry))),
        lambda: entry.update(more=1),
        lambda: header.update({f"{name}2": entry}),
        lambda: header.update({"empty": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        lambda: header.update(__metadata__=rng.choice([{}, {"a": "b"}, {"a": 1}, [], None, "x"])),
        lambda: header.update(__metadata__={rng.choice(["alias", name]): name}),
        lambda: header.pop(name),
    ]
    rng.choice(edits)()
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < 0.2:
        text = text[:-1] + b',"%s":%s}' % (name.encode(), json.dumps(entry).encode())
    text += b" " * rng.choice([0, 0, 3, 64])
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


ANY = [flipped, flipped, flipped_early, flipped_early, cut, longer, moved, unchanged]
MUTATIONS = {
    "zip": [*ANY, *[repacked] * 4],
    "legacy": ANY,
    "safetensors": [*ANY, *[reworded] * 5],
}


def spoiled(seed: int) -> tuple[str, str, bytes]:
    """The kind of a file, what happened to it, and its bytes."""
    rng = random.Random(seed)
    kind = rng.choice(["zip", "zip", "legacy", "safetensors"])
    mutation = rng.choice(MUTATIONS[kind])
    return kind, mutation.__name__, mutation(saved(rng, kind), rng)


# --- what the others say


REFUSED = object()


def by_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception:  # noqa: BLE001  # whatever it raises, it refuses
            return REFUSED


def by_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except Exception:  # noqa: BLE001  # as above
        return REFUSED


def by_ckptfix(path: Path, tally: Callable[..., None]) -> Any:
    """What it reads, or its refusal; anything but a `CkptfixError` is a failure of the test."""
    try:
        return ckptfix.load(path)
    except CkptfixError as refusal:
        has_a_reason(refusal)
        tally(f"refused by ckptfix: {refusal.code}")
        return refusal


def by_name(state: Any, theirs: Any) -> dict[str, Any]:
    """In the other's order, without the ties that only ckptfix restores."""
    return {name: state[name] for name in theirs}


def agree(path: Path, kind: str, tally: Callable[..., None]) -> bool:
    """Hold what ckptfix reads against what the others read; whether ckptfix reads it at all."""
    safe = kind == "safetensors"
    theirs = by_safetensors(path) if safe else by_torch(path)
    ours = by_ckptfix(path, tally)
    refused = isinstance(ours, CkptfixError)
    if theirs is not REFUSED and not refused:
        assert unlike(by_name(ours, theirs) if safe else ours, theirs) is None
        tally("both read it, and the same")
    elif theirs is not REFUSED:
        tally(f"only the other reads it; ckptfix says: {ours.code}")
    else:
        tally("both refuse" if refused else "only ckptfix reads it")
    return not refused


def agree_on_records(path: Path, tally: Callable[..., None]) -> None:
    """Where zipfile and ckptfix both accept an archive, they read the same records from it."""
    try:
        archive = zips.read(FileSource(path))
    except CkptfixError:
        return
    try:
        with zipfile.ZipFile(path) as theirs:
            contents = {name: theirs.read(name) for name in theirs.namelist()}
    except Exception:  # noqa: BLE001  # a CRC that is wrong, most often
        return
    assert {name: span.read() for name, span in archive.spans.items()} == contents
    tally("zipfile reads the same records")


def written(path: Path, out: Path, kind: str, tally: Callable[..., None]) -> None:
    """Whatever ckptfix writes of a file, torch or safetensors reads, and reads the same."""
    for suffix in (".pt", ".safetensors"):
        copy = out.with_suffix(suffix)
        copy.unlink(missing_ok=True)
        try:
            ckptfix.open(path).save(copy)
        except CkptfixError as refusal:
            assert not copy.exists()
            tally(f"not written: {refusal.code}")
            continue
        with warnings.catch_warnings(action="ignore"):  # of what is left out
            load = (
                ckptfix.load if suffix == ".pt" else partial(ckptfix.load_state_dict, strict=False)
            )
            meant = load(path)
        theirs = by_torch(copy) if suffix == ".pt" else by_safetensors(copy)
        if theirs is REFUSED:
            assert suffix == ".pt"
            assert by_torch(path) is REFUSED, "torch reads the original"
            tally("written, and as little for torch as the original")
            continue
        assert unlike(by_name(meant, theirs) if suffix != ".pt" else meant, theirs) is None
        tally("written and read back")


def campaign(seeds: range, tmp_path: Path, tally: Callable[..., None]) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    for seed in seeds:
        kind, how, data = spoiled(seed)
        path.write_bytes(data)
        tally(f"files: {kind}, {how}")
        try:
            if agree(path, kind, tally):
                written(path, out, kind, tally)
            else:
                assert how != "unchanged", "a sound file is refused"
            if kind == "zip":
                agree_on_records(path, tally)
        except Exception as error:
            error.add_note(f"seed {seed}: {kind}, {how}")
            raise
        path.unlink()


def test_spoiled_files_are_read_as_others_read_them(tmp_path: Path, tally: Callable[..., None]):
    campaign(range(SEED, SEED + QUICK), tmp_path, tally)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_thousands_of_spoiled_files(part: int, tmp_path: Path, tally: Callable[..., None]):
    size = FULL // 12
    seeds = range(SEED + part * size, SEED + (part + 1) * size)
    print(f"seeds {seeds.start} to {seeds.stop - 1}")  # noqa: T201
    campaign(seeds, tmp_path, tally)
