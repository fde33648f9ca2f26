"""Files made to harm whoever reads them, and a process in which every door is tried on one.

What the payloads would do, if they ran, is to make a file called `canary` in the working folder.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.helpers import laughs, u4, u8, unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

CANARY = "canary"
SHELL = f"touch {CANARY}"
PYTHON = f"open({CANARY!r}, 'w').close()"
WEIGHTS = [1.0, 2.0, 3.0]
_DATA = struct.pack("<3f", *WEIGHTS)


# --- a pickle by hand


@dataclass(frozen=True)
class Speller:
    """Spells values as a protocol does; persistent ids always as BINPERSID."""

    protocol: int

    def text(self, text: str) -> bytes:
        data = text.encode()
        if self.protocol == 0:
            return b"V" + data.replace(b"\n", b"\\u000a") + b"\n"
        if self.protocol < 4 or len(data) > 255:
            return b"X" + u4(len(data)) + data
        return b"\x8c%c" % len(data) + data

    def number(self, number: int) -> bytes:
        small = self.protocol and -(1 << 31) <= number < 1 << 31
        return b"J" + struct.pack("<i", number) if small else b"L%dL\n" % number

    def name(self, module: str, name: str) -> bytes:
        if self.protocol < 4:
            return f"c{module}\n{name}\n".encode()
        return self.text(module) + self.text(name) + b"\x93"

    def tuple(self, *items: bytes) -> bytes:
        if self.protocol >= 2 and 1 <= len(items) <= 3:
            return b"".join(items) + bytes([0x84 + len(items)])
        return b"(" + b"".join(items) + b"t"

    def dict(self, **items: bytes) -> bytes:
        pairs = (self.text(key) + value + b"s" for key, value in items.items())
        return (b"}" if self.protocol else b"(d") + b"".join(pairs)

    def call(self, module: str, name: str, *args: bytes) -> bytes:
        return self.name(module, name) + self.tuple(*args) + b"R"

    def numbers(self, *numbers: int) -> bytes:
        return self.tuple(*map(self.number, numbers))

    def whole(self, body: bytes) -> bytes:
        """The pickle of the one value that `body` pushes."""
        if self.protocol >= 4:
            body = b"\x95" + u8(len(body) + 1) + body
        return (b"\x80%c" % self.protocol if self.protocol >= 2 else b"") + body + b"."


@dataclass(frozen=True)
class Layout:
    """What a pickle says of the one tensor and its storage."""

    shape: tuple[int, ...] = (3,)
    stride: tuple[int, ...] = (1,)
    offset: int = 0
    numel: int = 3

    def spell(self, s: Speller, *more: bytes) -> bytes:
        """The call that rebuilds it; `more` ends the persistent id."""
        cls = s.name("torch", "FloatStorage")
        pid = s.tuple(
            s.text("storage"), cls, s.text("0"), s.text("cpu"), s.number(self.numel), *more
        )
        sizes = s.number(self.offset), s.numbers(*self.shape), s.numbers(*self.stride)
        hooks = s.call("collections", "OrderedDict")
        no = b"\x89" if s.protocol >= 2 else b"I00\n"
        return s.call("torch._utils", "_rebuild_tensor_v2", pid + b"Q", *sizes, no, hooks)


SOUND = Layout()


# --- the containers that hold a pickle


def zipped(records: dict[str, bytes]) -> bytes:
    """A torch zip with these records in its folder."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return made.getvalue()


def torch_zip(s: Speller, body: bytes, layout: Layout = SOUND) -> bytes:
    root = s.dict(evil=body, model=s.dict(weight=layout.spell(s)))
    return zipped({"data.pkl": s.whole(root), "data/0": _DATA, "version": b"3\n"})


def legacy(s: Speller, body: bytes, layout: Layout = SOUND) -> bytes:
    head: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    root = s.dict(evil=body, model=s.dict(weight=layout.spell(s, b"N")))
    pickles = [pickle.dumps(part, 2) for part in head] + [s.whole(root), pickle.dumps(["0"], 2)]
    return b"".join(pickles) + struct.pack("<q", 3) + _DATA


def tar(s: Speller, body: bytes, layout: Layout = SOUND) -> bytes:
    one, place = pickle.dumps(1, 2), pickle.dumps((1, "cpu", torch.FloatStorage), 2)
    sizes = (*layout.shape, *layout.stride, layout.offset)
    tensor = pickle.dumps((2, 1, torch.FloatTensor), 2) + struct.pack(
        f"<2i{len(sizes)}q", len(layout.shape), 0, *sizes
    )
    members = {
        "sys_info": pickle.dumps({}, 2),
        "storages": one + place + struct.pack("<q", layout.numel) + _DATA + pickle.dumps([], 2),
        "tensors": one + tensor,
        "pickle": s.whole(s.dict(evil=body, model=s.dict(weight=s.number(2) + b"Q"))),
    }
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def plain(s: Speller, body: bytes) -> bytes:
    protocol = min(s.protocol, 3)  # later ones have frames, which cannot be put into another's
    spelled = pickle.dumps(torch.tensor(WEIGHTS), protocol)[2 if protocol >= 2 else 0 : -1]
    return s.whole(s.dict(evil=body, model=s.dict(weight=spelled)))


def whole_model(s: Speller, body: bytes) -> bytes:
    module, name = "torch.nn.modules.linear", "Linear"
    new = s.name(module, name) + b")\x81" if s.protocol >= 2 else f"(i{module}\n{name}\n".encode()
    weight = s.call("collections", "OrderedDict") + s.text("weight") + SOUND.spell(s) + b"s"
    empty = s.call("collections", "OrderedDict")
    parts = s.dict(_parameters=weight, _buffers=empty, _modules=empty, evil=body)
    root = s.whole(new + parts + b"b")
    return zipped({"data.pkl": root, "data/0": _DATA, "version": b"3\n"})


def torchscript(s: Speller, body: bytes) -> bytes:
    new = s.name("__torch__", "Net") + b")" + b"R"
    root = s.whole(new + s.dict(evil=body, weight=SOUND.spell(s)) + b"b")
    code = {"code/__torch__.py": b"class Net(Module):\n", "constants.pkl": s.whole(b")")}
    return zipped({"data.pkl": root, **code, "data/0": _DATA, "version": b"3\n"})


def packed(s: Speller, body: bytes) -> bytes:
    return gzip.compress(torch_zip(s, body), mtime=0)


def in_a_tar(s: Speller, body: bytes) -> bytes:
    data, made = torch_zip(s, body), io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo("model.pt")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def unpacked(s: Speller, body: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(torch_zip(s, body))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def shards(s: Speller, body: bytes) -> dict[str, bytes]:
    shard = "pytorch_model-00001-of-00001.bin"
    root = s.dict(evil=body, weight=SOUND.spell(s))
    index = {"metadata": {}, "weight_map": {"evil": shard, "weight": shard}}
    return {
        shard: zipped({"data.pkl": s.whole(root), "data/0": _DATA, "version": b"3\n"}),
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
    }


def _object(s: Speller, name: str, state: bytes) -> bytes:
    module = "torch.distributed.checkpoint.metadata"
    if name == "_StorageInfo":
        module = "torch.distributed.checkpoint.filesystem"
    new = s.name(module, name) + b")\x81" if s.protocol >= 2 else f"(i{module}\n{name}\n".encode()
    return new + state + b"b"


def _dcp(s: Speller, items: dict[str, bytes], meta: bytes) -> dict[str, bytes]:
    """A DCP folder with some values beside the weights; `meta` tells who saved it."""

    def size(*numbers: int) -> bytes:
        return s.call("torch", "Size", s.numbers(*numbers))

    no = b"\x89" if s.protocol >= 2 else b"I00\n"
    properties = s.tuple(s.name("torch", "float32"), b"N", no, b"N", no)
    chunk = _object(s, "ChunkStorageMetadata", s.dict(offsets=size(0), sizes=size(3)))
    told = {
        "properties": _object(s, "TensorProperties", properties),
        "size": size(3),
        "chunks": b"(" + chunk + b"l",
    }
    wholes = {name: _object(s, "BytesStorageMetadata", b"}" if s.protocol else b"(d")
              for name in items}  # fmt: skip
    wholes["model.weight"] = _object(s, "TensorStorageMetadata", s.dict(**told))
    every = {**items, "model.weight": SOUND.spell(s)}
    data, storage = b"", b"}" if s.protocol else b"(d"
    for name, body in every.items():
        slice_ = zipped({"data.pkl": s.whole(body), "data/0": _DATA, "version": b"3\n"})
        where = {"relative_path": s.text("__0_0.distcp"), "offset": s.number(len(data)),
                 "length": s.number(len(slice_))}  # fmt: skip
        offset = {} if name in items else {"offset": size(0)}
        index = _object(s, "MetadataIndex", s.dict(fqn=s.text(name), **offset))
        storage += index + _object(s, "_StorageInfo", s.dict(**where)) + b"s"
        data += slice_
    paths = {name: s.tuple(*map(s.text, name.split("."))) for name in every}
    fields = {
        "state_dict_metadata": s.dict(**wholes),
        "planner_data": s.dict(**paths),
        "storage_data": storage,
        "storage_meta": meta,
    }
    metadata = s.whole(_object(s, "Metadata", s.dict(**fields)))
    return {".metadata": metadata, "__0_0.distcp": data}


def dcp_item(s: Speller, body: bytes) -> dict[str, bytes]:
    return _dcp(s, {"evil": body}, b"N")


def dcp_metadata(s: Speller, body: bytes) -> dict[str, bytes]:
    return _dcp(s, {}, body)


Files = bytes | dict[str, bytes]
"""A file, or the files of a folder by their paths in it."""

CONTAINERS: dict[str, Callable[[Speller, bytes], Files]] = {
    "zip": torch_zip, "legacy": legacy, "tar": tar, "plain": plain, "torchscript": torchscript,
    "whole-model": whole_model, "gzip": packed, "zip in a tar": in_a_tar, "unpacked": unpacked,
    "shards": shards, "dcp item": dcp_item, "dcp metadata": dcp_metadata,
}  # fmt: skip


def put(path: Path, files: Files) -> None:
    """Write a file, or a folder of files."""
    if isinstance(files, bytes):
        path.write_bytes(files)
        return
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


# --- payloads: each pushes one value

NESTED = b"cos\nsystem\n" + Speller(0).text(SHELL) + b"\x85R."
"""A pickle inside a pickle."""

CALLS: dict[str, tuple[str, str, tuple[str | bytes | list[str], ...]]] = {
    "os.system": ("os", "system", (SHELL,)),
    "posix.system": ("posix", "system", (SHELL,)),
    "nt.system": ("nt", "system", (SHELL,)),
    "os.popen": ("os", "popen", (SHELL,)),
    "subprocess.Popen": ("subprocess", "Popen", (["touch", CANARY],)),
    "subprocess.check_output": ("subprocess", "check_output", (["touch", CANARY],)),
    "builtins.eval": ("builtins", "eval", (PYTHON,)),
    "builtins.exec": ("builtins", "exec", (PYTHON,)),
    "__builtin__.eval": ("__builtin__", "eval", (PYTHON,)),
    "builtins.open": ("builtins", "open", (CANARY, "w")),
    "pathlib.Path.touch": ("pathlib", "Path.touch", (CANARY,)),
    "timeit.timeit": ("timeit", "timeit", (PYTHON,)),
    "cProfile.run": ("cProfile", "run", (PYTHON,)),
    "pickle.loads": ("pickle", "loads", (NESTED,)),
    "_pickle.loads": ("_pickle", "loads", (NESTED,)),
    "torch.load_from_bytes": ("torch.storage", "_load_from_bytes", (NESTED,)),
    "torch.hub": ("torch.hub", "_load_local", (".", CANARY)),
    "torch.compile_source": ("torch.fx.graph_module", "_exec_with_source", (PYTHON, "x")),
    "torch.cpp_extension": ("torch.utils.cpp_extension", "load_inline", (CANARY, PYTHON)),
    "numpy.runstring": ("numpy.testing._private.utils", "runstring", (PYTHON, "x")),
    "codecs.decode": ("_codecs", "decode", (NESTED, "rot13")),
}  # fmt: skip


def _value(s: Speller, value: str | bytes | list[str]) -> bytes:
    if isinstance(value, str):
        return s.text(value)
    if isinstance(value, bytes):
        return b"B" + u4(len(value)) + value
    return b"(" + b"".join(map(s.text, value)) + b"l"


def called(module: str, name: str, args: tuple[Any, ...]) -> Callable[[Speller], bytes]:
    return lambda s: s.call(module, name, *(_value(s, arg) for arg in args))


def _system(s: Speller) -> bytes:
    return s.name("os", "system")


def _shell(s: Speller) -> bytes:
    return s.tuple(s.text(SHELL))


HOWS: dict[str, Callable[[Speller], bytes]] = {
    "GLOBAL": lambda _: b"cos\nsystem\n",
    "STACK_GLOBAL": lambda _: Speller(4).name("os", "system"),
    "NEWOBJ": lambda s: _system(s) + _shell(s) + b"\x81",
    "NEWOBJ_EX": lambda s: _system(s) + _shell(s) + b"}\x92",
    "INST": lambda s: b"(" + s.text(SHELL) + b"ios\nsystem\n",
    "OBJ": lambda s: b"(" + _system(s) + s.text(SHELL) + b"o",
    "BUILD": lambda s: s.call("os", "_wrap_close") + s.dict(__setstate__=_system(s)) + b"b",
    "BUILD slots": lambda s: (
        s.call("x", "Y") + s.tuple(b"N", s.dict(__class__=_system(s))) + b"b"
    ),
    "__newobj_ex__": lambda s: s.call(
        "copyreg", "__newobj_ex__", _system(s), _shell(s), s.dict()
    ),
    "__newobj__": lambda s: s.call("copyreg", "__newobj__", _system(s), s.text(SHELL)),
    "_reconstructor": lambda s: s.call("copyreg", "_reconstructor", _system(s), _system(s), b"N"),
    "add_extension": lambda s: s.call(
        "copyreg", "add_extension", s.text("os"), s.text("system"), s.number(1)
    ),
    "getattr": lambda s: (
        s.call("builtins", "getattr", s.name("os", "path"), s.text("os.system")) + _shell(s) + b"R"
    ),
    "__import__": lambda s: (
        s.call("builtins", "getattr", s.call("builtins", "__import__", s.text("os")),
               s.text("system")) + _shell(s) + b"R"
    ),
    "dotted name": lambda s: s.call("os", "path.os.system", s.text(SHELL)),
    "partial": lambda s: s.call("functools", "partial", _system(s), s.text(SHELL)) + b")R",
    "map": lambda s: s.call("builtins", "list", s.call("builtins", "map", _system(s), _shell(s))),
    "OrderedDict": lambda s: s.call("collections", "OrderedDict") + s.dict(x=_system(s)) + b"b",
    "item set": lambda s: s.call("x", "Y") + s.text("k") + _system(s) + b"s",
    "appended": lambda s: s.call("x", "Y") + _system(s) + b"a",
    "dict key": lambda s: b"(" + s.call("os", "system", s.text(SHELL)) + b"I1\nd",
    "_rebuild_parameter": lambda s: s.call(
        "torch._utils", "_rebuild_parameter", _system(s), b"N", _system(s)
    ),
}  # fmt: skip

INERT: dict[str, Callable[[Speller], bytes]] = {
    **{name: called(*row) for name, row in CALLS.items()}, **HOWS,
}  # fmt: skip
DEEP = 5_000

VALUES_KEPT: dict[str, bytes] = {
    "memo index 2**31": b"]r\x00\x00\x00\x80j\x00\x00\x00\x80\x86",
    "list in itself": b"]q\x00h\x00a",
    "dict in itself": b"}q\x00(K\x01h\x00u",
    "lists, a billion laughs": b"(" + laughs(30, b"]", b"l") + b"l",
    "dict keys of every scalar": b"}(K\x01N\x88NNNC\x01aNG" + bytes(8) + b"Nu",
    "nested lists": b"(" * DEEP + b"l" * DEEP,
    "nested tuples": b")" + b"\x85" * DEEP,
    "numbers": b"(K\x01M\x01\x01J\xff\xff\xff\xffI7\nI01\nL8L\n\x8a\x01\x05\x8b\x01\x00\x00\x00\x05"
    b"\x88\x89NF1.5\nG" + bytes(8) + b"l",
    "texts": b"(S'a'\nT\x01\x00\x00\x00aU\x01aVa\nX\x01\x00\x00\x00a\x8c\x01a\x8d" + u8(1) + b"a"
    b"C\x01aB\x01\x00\x00\x00a\x8e" + u8(1) + b"a\x96" + u8(1) + b"al",
    "containers": b"(](N1(K\x01K\x02d}]K\x01a(K\x02e(K\x03t)\x8f(K\x01\x90(K\x01\x91"
    b"K\x01\x85K\x01K\x02\x86K\x01K\x02K\x03\x87l",
    "the memo": b"(]p7\ng7\nq\x08h\x08r\x09\x01\x00\x00j\x09\x01\x00\x00]\x94]20l",
}
"""Opcodes that push something odd that is read all the same."""

REFUSED: dict[str, tuple[bytes, str]] = {
    "EXT1": (b"\x82\x01", "unsafe"),
    "EXT2": (b"\x83\x01\x00", "unsafe"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "unsafe"),
    "NEXT_BUFFER": (b"\x97", "unsupported"),
    "READONLY_BUFFER": (b"N\x98", "unsupported"),
    "frame in a frame": (b"\x95" + u8(20) + b"\x95" + u8(1) + b"N" + b"N" * 10, "unsafe"),
    "frame that an opcode straddles": (b"\x95" + u8(1) + b"K\x01", "unsafe"),
    "BINUNICODE8 of 2**62": (b"\x8d" + u8(1 << 62), "damaged"),
    "BINBYTES8 of 2**62": (b"\x8e" + u8(1 << 62), "damaged"),
    "BYTEARRAY8 of 2**63": (b"\x96" + u8(1 << 63), "damaged"),
    "BINBYTES of 2**32": (b"B\xff\xff\xff\xff", "damaged"),
    "BINSTRING of -1": (b"T\xff\xff\xff\xff", "damaged"),
    "LONG4 of 2**30": (b"\x8b" + u4(1 << 30), "unsafe"),
    "LONG4 of -1": (b"\x8b\xff\xff\xff\xff", "damaged"),
    "LONG of 5000 digits": (b"L" + b"9" * 5000 + b"L\n", "unsafe"),
    "GET of nothing": (b"h\x63", "damaged"),
    "no such opcode": (b"\xff", "damaged"),
    "protocol 6": (b"\x80\x06N", "unsupported"),
    "a key that is a list": (b"}]Ns", "damaged"),
    "a key of many tuples": (b"}" + b"(" * 2000 + b"t" * 2000 + b"Ns", "unsafe"),
    "a key of a billion laughs": (b"}" + laughs(30, b")", b"t") + b"Ns", "unsafe"),
    "class name of 2000 letters": (b"cx\n" + b"y" * 2000 + b"\n", "unsafe"),
    "class named by bytes": (b"C\x02osC\x06system\x93", "unsafe"),
    "a number is called": (b"K\x01)R", "unsafe"),
    "arguments that are a list": (b"cos\nsystem\n]R", "damaged"),
    "a number is built": (b"K\x01}b", "unsafe"),
    "appended to a number": (b"K\x01Na", "unsafe"),
    "stack underflow": (b"0000000", "damaged"),
}
"""Opcodes, and the code of the error that they end in."""

PERSISTENT: dict[str, bytes] = {
    "PERSID": b"Pabc\n",
    "persistent id that is a number": b"K\x63Q",
    "persistent id that is a call": b"cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85RQ",
    "persistent id of six": b"(NNNNNNtQ",
    "class that is a call": b"(X\x07\x00\x00\x00storagecos\nsystem\n)RX\x01\x00\x00\x000NK\x03tQ",
    "class that is os.system": (
        b"(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ"
    ),
}
"""Persistent ids that are none of torch's."""


# --- files that are hostile in other ways than by their pickle


def described(layout: Layout) -> bytes:
    """A torch zip that says this of its three numbers."""
    return torch_zip(Speller(2), b"N", layout)


def _sound() -> bytes:
    return described(SOUND)


def _twice(name: str) -> bytes:
    made = io.BytesIO(_sound())
    with zipfile.ZipFile(made, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(zipfile.ZipInfo(name), NESTED)
    return made.getvalue()


def _replaced(old: bytes, new: bytes, count: int = 1) -> bytes:
    """A sound archive with one stretch of bytes exchanged for one as long."""
    data = _sound()
    assert old in data
    assert len(old) == len(new)
    return data.replace(old, new, count)


def _deflated(size: int) -> bytes:
    """A storage of three numbers whose record unpacks to much more."""
    made = io.BytesIO()
    s = Speller(2)
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", s.whole(s.dict(weight=SOUND.spell(s))))
        archive.writestr("archive/data/0", bytes(size))
    return made.getvalue()


def _deflated_pickle(body: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", Speller(2).whole(body))
    return made.getvalue()


def lying_bomb() -> bytes:
    """The same, with a directory and a header that promise twelve bytes."""
    data, size = _deflated(1 << 24), struct.pack("<I", 1 << 24)
    return data.replace(size, struct.pack("<I", 12))


def _tensors(header: str | dict[str, Any], data: bytes = _DATA, size: int | None = None) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return u8(len(text) if size is None else size) + text.encode() + data


def _entry(begin: int = 0, end: int = 12, shape: tuple[int, ...] = (3,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


_ITEM = zipped({"data.pkl": Speller(2).whole(SOUND.spell(Speller(2))), "data/0": _DATA})
_HERE = ("__0_0.distcp", 0, len(_ITEM))


def pieces(
    shape: tuple[int, ...] = (3,),
    chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = (((0,), (3,)),),
    places: Sequence[tuple[tuple[int, ...], tuple[str, int, int]]] = (((0,), _HERE),),
    path: tuple[str | int, ...] = ("w",),
) -> dict[str, bytes]:
    """A DCP folder that says this of its one tensor: its chunks (offsets, sizes), and where each
    of them lies (file, offset, length)."""
    s = Speller(4)

    def size(numbers: Iterable[int]) -> bytes:
        return s.call("torch", "Size", s.numbers(*numbers))

    boxes = b"".join(
        _object(s, "ChunkStorageMetadata", s.dict(offsets=size(offsets), sizes=size(sizes)))
        for offsets, sizes in chunks
    )
    told = b"}"
    for offsets, (file, begin, length) in places:
        where = {"relative_path": s.text(file), "offset": s.number(begin),
                 "length": s.number(length)}  # fmt: skip
        index = _object(s, "MetadataIndex", s.dict(fqn=s.text("w"), offset=size(offsets)))
        told += index + _object(s, "_StorageInfo", s.dict(**where)) + b"s"
    properties = s.tuple(s.name("torch", "float32"), b"N", b"\x89", b"N", b"\x89")
    whole = {"properties": _object(s, "TensorProperties", properties), "size": size(shape),
             "chunks": b"(" + boxes + b"l"}  # fmt: skip
    steps = [s.text(step) if isinstance(step, str) else s.number(step) for step in path]
    fields = {
        "state_dict_metadata": s.dict(w=_object(s, "TensorStorageMetadata", s.dict(**whole))),
        "planner_data": s.dict(w=s.tuple(*steps)),
        "storage_data": told,
    }
    return {".metadata": s.whole(_object(s, "Metadata", s.dict(**fields))), "__0_0.distcp": _ITEM}


_TWO = (((0,), (3,)), ((3,), (3,)))
_SECOND = ("__1_0.distcp", 0, len(_ITEM))

FILES: dict[str, tuple[Callable[[], Files], str]] = {
    "dcp: a name that leaves the folder": (
        lambda: pieces(places=[((0,), ("../__0_0.distcp", 0, 9))]), "piece-name"
    ),
    "dcp: an absolute name": (lambda: pieces(places=[((0,), ("/etc/passwd", 0, 9))]), "piece-name"),
    "dcp: a name of another drive": (
        lambda: pieces(places=[((0,), ("C:x.distcp", 0, 9))]), "piece-name"
    ),
    "dcp: a name of a million letters": (
        lambda: pieces(places=[((0,), ("x" * 1_000_000, 0, 9))]), "piece-name"
    ),
    "dcp: a slice past the end": (
        lambda: pieces(places=[((0,), ("__0_0.distcp", 0, len(_ITEM) + 1))]), "piece-missing"
    ),
    "dcp: a slice of 2^62": (
        lambda: pieces(places=[((0,), ("__0_0.distcp", 1 << 62, 1 << 62))]), "piece-missing"
    ),
    "dcp: a slice before the beginning": (
        lambda: pieces(places=[((0,), ("__0_0.distcp", -9, 9))]), "unsafe"
    ),
    "dcp: a slice of nothing": (
        lambda: pieces(places=[((0,), ("__0_0.distcp", 0, 0))]), "damaged"
    ),
    "dcp: a slice that begins in an item": (
        lambda: pieces(places=[((0,), ("__0_0.distcp", 8, len(_ITEM) - 8))]), "damaged"
    ),
    "dcp: slices over each other": (
        lambda: pieces((6,), _TWO, [((0,), _HERE), ((3,), ("__0_0.distcp", 1, 99))]),
        "pieces-overlap"
    ),
    "dcp: two chunks in one slice": (
        lambda: pieces((6,), _TWO, [((0,), _HERE), ((3,), _HERE)]), "pieces-overlap"
    ),
    "dcp: a file that is not there": (
        lambda: pieces((6,), _TWO, [((0,), _HERE), ((3,), _SECOND)]), "piece-missing"
    ),
    "dcp: a file that is itself": (
        lambda: pieces(places=[((0,), (".metadata", 0, 99))]), "damaged"
    ),
    "dcp: a chunk that lies nowhere": (lambda: pieces((6,), _TWO), "piece-missing"),
    "dcp: two places for a chunk": (
        lambda: pieces(places=[((0,), _HERE), ((0,), _SECOND[:1] + _HERE[1:])]), "piece-twice"
    ),
    "dcp: a chunk twice": (lambda: pieces((3,), [_TWO[0]] * 2), "pieces-overlap"),
    "dcp: chunks over each other": (
        lambda: {**pieces((5,), (_TWO[0], ((2,), (3,))), [((0,), _HERE), ((2,), _SECOND)]),
                 "__1_0.distcp": _ITEM}, "pieces-overlap"
    ),
    "dcp: a gap": (lambda: pieces((6,)), "piece-missing"),
    "dcp: no chunk": (lambda: pieces((6,), ()), "piece-missing"),
    "dcp: a chunk past the end": (lambda: pieces((2,)), "piece-outside"),
    "dcp: a chunk that begins before it": (
        lambda: pieces((3,), [((-1,), (3,))], [((-1,), _HERE)]), "piece-outside"
    ),
    "dcp: a chunk that overflows": (
        lambda: pieces((3,), [(((1 << 63) - 1,), (3,))], [(((1 << 63) - 1,), _HERE)]),
        "piece-outside"
    ),
    "dcp: a chunk of other dimensions": (lambda: pieces((3, 1)), "piece-outside"),
    "dcp: a shape that overflows": (
        lambda: pieces((3, 1 << 62), [((0, 0), (3,))], [((0, 0), _HERE)]), "unsafe"
    ),
    "dcp: a shape of a million dimensions": (lambda: pieces((1,) * 1_000_000), "damaged"),
    "dcp: a negative shape": (lambda: pieces((-3,)), "unsafe"),
    "dcp: an item of another shape": (
        lambda: pieces((1, 3), [((0, 0), (1, 3))], [((0, 0), _HERE)]), "unsafe"
    ),
    "dcp: a place in a list of 2^40": (lambda: pieces(path=("l", 1 << 40)), "unsafe"),
    "dcp: a place before a list": (lambda: pieces(path=("l", -1)), "unsafe"),
    "dcp: a path of a million keys": (lambda: pieces(path=("a",) * 1_000_000), "unsafe"),
    "dcp: no path": (lambda: pieces(path=()), "damaged"),
    "zip: a name twice": (lambda: _twice("archive/data.pkl"), "unsafe"),
    "zip: names equal but for case": (lambda: _twice("archive/DATA.pkl"), "unsafe"),
    "zip: header and directory disagree": (
        lambda: _replaced(b"archive/data.pkl", b"archive/evil.pkl"), "unsafe"
    ),
    "zip: bytes before it": (lambda: b"PK\x03\x04" + b"#" * 60 + _sound(), "unsafe"),
    "zip: two in one": (lambda: _sound() + _sound(), "unsafe"),
    "zip: encrypted": (lambda: _replaced(b"PK\x01\x02\x14\x03\x14\x00\x00",
                                         b"PK\x01\x02\x14\x03\x14\x00\x01"), "unsupported"),
    "zip: a bomb": (lambda: _deflated(1 << 26), "unsafe"),
    "zip: a pickle of sets, packed 800 to 1": (
        lambda: _deflated_pickle(b"(" + b"\x8f" * 700_000 + b"l"), "unsafe"
    ),
    "zip: no end": (lambda: _sound()[:-22], "damaged"),
    "zip: the storage is longer": (lambda: described(Layout(numel=2, shape=(2,))), "unsafe"),
    "zip: the storage is shorter": (lambda: described(Layout(numel=4)), "unsafe"),
    "zip: a pickle of another checksum": (
        lambda: _replaced(b"evilN", b"evil\x88"), "crc-mismatch"
    ),
    "tensor: shape outside": (lambda: described(Layout(shape=(4,))), "unsafe"),
    "tensor: offset outside": (lambda: described(Layout(offset=1)), "unsafe"),
    "tensor: offset below": (lambda: described(Layout(offset=-1)), "unsafe"),
    "tensor: stride outside": (lambda: described(Layout(stride=(2,))), "unsafe"),
    "tensor: stride below": (lambda: described(Layout(stride=(-1,))), "unsafe"),
    "tensor: size below": (lambda: described(Layout(shape=(-3,))), "unsafe"),
    "tensor: expanded to terabytes": (
        lambda: described(Layout(shape=(1 << 39,), stride=(0,))), "unsafe"
    ),
    "tensor: sizes whose product overflows": (
        lambda: described(Layout(shape=(1 << 32, 1 << 32), stride=(0, 0))), "unsafe"
    ),
    "tensor: 65 dimensions": (
        lambda: described(Layout(shape=(1,) * 65, stride=(1,) * 65)), "unsafe"
    ),
    "tensor: a storage of 2**63": (lambda: described(Layout(numel=1 << 63)), "unsafe"),
    "safetensors: overlap": (
        lambda: _tensors({"a": _entry(0, 8, (2,)), "b": _entry(4, 12, (2,))}), "unsafe"
    ),
    "safetensors: hole": (
        lambda: _tensors({"a": _entry(0, 4, (1,)), "b": _entry(8, 12, (1,))}), "unsafe"
    ),
    "safetensors: tail": (lambda: _tensors({"a": _entry()}, _DATA + b"tail"), "damaged"),
    "safetensors: cut short": (lambda: _tensors({"a": _entry()}, _DATA[:8]), "damaged"),
    "safetensors: sizes overflow": (
        lambda: _tensors({"a": _entry(0, 12, (1 << 62, 1 << 62))}), "damaged"
    ),
    "safetensors: a negative size": (lambda: _tensors({"a": _entry(0, 12, (-3,))}), "damaged"),
    "safetensors: a key twice": (
        lambda: _tensors('{"a":%s,"a":%s}' % ((json.dumps(_entry()),) * 2)), "unsafe"
    ),
    "safetensors: header of 2**63": (
        lambda: _tensors({"a": _entry()}, size=1 << 63), "not-a-checkpoint"
    ),
    "safetensors: header of 100 MB and a byte": (
        lambda: _tensors({"a": _entry()}, size=100_000_001), "unsafe"
    ),
    "safetensors: deep header": (lambda: _tensors('{"a":' + "[" * 50_000), "damaged"),
    "gzip: in gzip": (
        lambda: gzip.compress(gzip.compress(b"\x80\x02" + b"]" * (1 << 23) + b".", mtime=0)),
        "unsafe",
    ),
    "gzip: 1200 times": (
        lambda: reduce(lambda data, _: gzip.compress(data, mtime=0), range(1200), _sound()),
        "unsafe",
    ),
    "gzip: of a deflated pickle": (
        lambda: gzip.compress(_deflated_pickle(b"(" + b"]" * (1 << 25) + b"l"), mtime=0), "unsafe"
    ),
    "gzip: of a pickle of sets": (
        lambda: gzip.compress(b"\x80\x02(" + b"\x8f" * 900_000 + b"l.", mtime=0), "unsafe"
    ),
    "gzip: a bomb": (lambda: gzip.compress(bytes(1 << 24), mtime=0) * 17, "unsafe"),
    "LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
        + b"\nsize 12\n", "lfs-pointer"
    ),
    "HTML": (lambda: b"\n\n<!DOCTYPE html><html>404</html>", "html"),
    "JSON": (lambda: b'{"error": "Repository not found"}', "json"),
    "an index alone": (
        lambda: json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode(),
        "shard-absent",
    ),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(40), "packed"),
    "empty": (lambda: b"", "empty"),
    "zeros": (lambda: bytes(4096), "zeros"),
}  # fmt: skip
"""Files, and the code of the error that they end in."""

WEIGHT_MAPS = (
    "../evil.safetensors", "/etc/evil.safetensors", "C:\\evil.safetensors", "C:evil.safetensors",
    "sub/../../evil.safetensors", "evil.pkl", "\\\\host\\evil.safetensors", "",
)  # fmt: skip
"""Names of shards that an index must not lead to."""


# --- every door, tried in a process of its own


class Doors:
    """A warm process that forks for each file, so that one cannot spoil the next."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.hostile"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=unmeasured(),
        )

    def try_all(self, path: Path) -> dict[str, Any]:
        """What each door made of the file at `path`, what that cost, and what was left behind."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(str(path)) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


VERBS = {
    "inspect": [], "check": [], "fix": ["fixed.pt"], "convert": ["converted.safetensors"],
}  # fmt: skip
ADDRESSES = 1 << 30


def _serve() -> None:
    import ckptfix.api  # noqa: F401 - so that no child has to

    for verb in VERBS:
        __import__(f"ckptfix.cli.{verb}")
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_in_a_child(Path(json.loads(line)))) + "\n")
        sys.stdout.flush()


def _in_a_child(path: Path) -> dict[str, Any]:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        with os.fdopen(theirs, "w") as answer:
            json.dump(_try_all(path), answer)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        text = answer.read()
    status = os.waitpid(child, 0)[1]
    died = {"died": os.waitstatus_to_exitcode(status)}
    found: dict[str, Any] = json.loads(text) if text else died
    return found


def _try_all(path: Path) -> dict[str, Any]:
    import resource

    os.chdir(path.parent)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    before = resource.getrusage(resource.RUSAGE_SELF)
    library = dict(_library(path))
    verbs = {verb: _verb(verb, path.name, *out) for verb, out in VERBS.items()}
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "library": library,
        "verbs": verbs,
        "memory": (after.ru_maxrss - before.ru_maxrss) * 1024,
        "left": sorted(os.listdir()),
    }


def _library(path: Path) -> Iterator[tuple[str, str | list[float] | None]]:
    """By function, the code of the error that it raised, or what it gave."""
    import ckptfix

    doors: dict[str, Callable[[], Any]] = {
        "open": lambda: _nothing(ckptfix.open(path)),
        "load": lambda: _nothing(ckptfix.load(path)),
        "load_state_dict": lambda: [
            number
            for value in ckptfix.load_state_dict(path, strict=False).values()
            if hasattr(value, "storage")  # of shards, it has what is beside the weights too
            for number in value.tolist()
        ],
    }
    for name, door in doors.items():
        _limit_time()
        try:
            yield name, door()
        except ckptfix.CkptfixError as error:
            yield name, error.code
        except Exception as error:  # noqa: BLE001 - told to the test
            yield name, f"escaped: {error!r}"


def _nothing(_: object) -> None:
    """What a door that is only tried gives."""


def _limit_time() -> None:
    """One second of the processor and what is left of another, then the process is ended."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _verb(verb: str, *arguments: str) -> dict[str, Any]:
    from ckptfix.cli import main

    _limit_time()
    sys.argv = ["ckptfix", verb, *arguments]
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO()) for _ in range(2))
    code: Any = None
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    told = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        told.append(stream.buffer.getvalue().decode())
    sys.stdout, sys.stderr = streams
    return {"code": code, "out": told[0][-2000:], "err": told[1][-2000:]}


if __name__ == "__main__":
    _serve()
