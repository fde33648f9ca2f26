"""What the fuzzer starts from: small fixtures, and tiny files of every form."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptfix import pickles
from ckptfix.bytes.source import BytesSource
from ckptfix.formats.zip import archive as zips
from ckptfix.tree.document import Global, Inert, OrderedMap

if TYPE_CHECKING:
    from collections.abc import Iterator

FIXTURES = Path(__file__).parents[2] / "fixtures"
LONGEST = 4096
"""Bytes of an input; what is longer finds nothing that shorter ones do not."""

_STORAGE = ("storage", Global("torch", "FloatStorage"), "0", "cuda:0", 2)
_VALUES: tuple[Any, ...] = (
    None, True, -1, 300, 1 << 40, -(1 << 70), 0.5, "a", "\u00fc\n", b"\xff", bytearray(b"x"),
    (1, 2), [1, [2], (3, 4, 5, 6)], {"a": 1, 2: {}}, {1, 2}, frozenset("a"), complex(1, 2),
    {"layer.weight": [1.0] * 3},
)  # fmt: skip


def _pickled() -> Iterator[bytes]:
    for protocol in range(6):
        for value in (*_VALUES, list(_VALUES)):
            yield pickle.dumps(value, protocol)
    shared: list[Any] = [[]]
    shared.append(shared)
    made = Inert(
        Global("a", "B.C"), (1,), {"k": 2}, "newobj_ex", True, {"x": shared}, [1], [(2, 3)]
    )
    yield pickles.write(OrderedMap({"a": made, "b": made}, {"_metadata": {}}))[0]
    yield b"(S'a'\nI01\nL5L\nF1.5\nV\\u00fc\ntp0\n0g0\n."
    yield b"(cm\nC\nK\x01o(im\nC\n0}(K\x01K\x02db."


def _tensor_pickle() -> bytes:
    """A tensor in opcodes, as torch's own pickler writes it."""
    return (
        b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02"
        b"((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05"
        b"X\x03\x00\x00\x00cpuq\x06K\x02tq\x07QK\x00K\x02\x85q\x08K\x01\x85q\x09\x89"
        b"ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0ds."
    )


def _zip(method: int, **records: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return packed.getvalue()


def without_crcs(data: bytes) -> bytes:
    """The archive as a writer that computes no checksums leaves it: any change passes the CRC."""
    archive, changed = zips.read(BytesSource(data)), bytearray(data)
    for entry in archive.entries:
        for place in (entry.header + 14, archive.directory + entry.place + 16):
            changed[place : place + 4] = bytes(4)
    return bytes(changed)


def _zips() -> Iterator[bytes]:
    small = {"a/data.pkl": _tensor_pickle(), "a/data/0": bytes(8), "a/byteorder": b"little"}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        yield _zip(method, **small)
        yield without_crcs(_zip(method, **small))
    model = {"tensors": [{"dims": ["2"], "strides": ["1"], "dataType": "FLOAT",
                          "data": {"key": "tensors/0"}}],
             "mainModule": {"parameters": [{"name": "w", "tensorId": "0"}]}}  # fmt: skip
    yield without_crcs(
        _zip(0, **{"a/model.json": json.dumps(model).encode(), "a/tensors/0": bytes(8)})
    )
    for path in FIXTURES.glob("*.pt"):
        data = path.read_bytes()
        if data.startswith(b"PK") and len(data) <= LONGEST:
            yield data
            yield without_crcs(data)


def _safetensors() -> Iterator[bytes]:
    yield from (path.read_bytes() for path in FIXTURES.glob("*.safetensors"))
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header in ({}, {"w": entry}, {"w": entry, "__metadata__": {"v": "w", "format": "pt"}}):
        text = json.dumps(header).encode()
        yield struct.pack("<Q", len(text)) + text + bytes(8 if header else 0)


def _legacy() -> Iterator[bytes]:
    yield from (path.read_bytes() for path in FIXTURES.glob("legacy*.pt"))
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(value, 2) for value in heads)
    tree = _tensor_pickle().replace(b"K\x02tq\x07Q", b"K\x02Ntq\x07Q")
    yield head + tree + pickle.dumps(["0"], 2) + struct.pack("<q", 2) + bytes(8)


def _tars() -> Iterator[bytes]:
    row = pickles.write((11, "cpu", Global("torch", "FloatStorage")))[0]
    stored = pickle.dumps(1, 2) + row + struct.pack("<q", 2) + bytes(8)
    laid = pickle.dumps(1, 2) + pickle.dumps((22, 11, "T"), 2) + struct.pack("<2i3q", 1, 0, 2, 1, 0)
    yield _tar(storages=stored + pickle.dumps([(33, 11, 0, 1)], 2), tensors=laid,
               pickle=b"\x80\x02}U\x01wU\x0222Qs.")  # fmt: skip
    yield _tar(inner=next(_safetensors()))


def _tar(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue().rstrip(b"\0") + bytes(512)


def _files() -> Iterator[bytes]:
    import gzip

    for some in (_zips, _safetensors, _legacy, _tars):
        yield from some()
    yield gzip.compress(next(_zips()), mtime=0)
    yield b'{"metadata": {}, "weight_map": {"w": "../x.safetensors"}}'
    yield b'{"weight_map": {"w": "a.safetensors"}}'
    yield from (
        b"",
        bytes(32),
        b"<!doctype html>",
        b"version https://git-lfs",
        b"(dp0\nS'a'\nI1\ns.",
    )


def of(target: str) -> list[bytes]:
    """The first inputs of a target, none of them long."""
    makers = {"zip": _zips, "torchzip": _zips, "safetensors": _safetensors, "legacy": _legacy,
              "tar": _tars, "file": _files}  # fmt: skip
    if target in ("pickle", "rewrite"):
        return [*_pickled(), _tensor_pickle()]
    return [data for data in makers[target]() if len(data) <= LONGEST]
