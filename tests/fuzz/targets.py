"""What is fuzzed, and what has to hold whatever the bytes are.

A target takes bytes. It returns True where they were accepted and False where they were refused
with a `CkptfixError`; anything else that is raised is a bug. While a target runs, importing,
running code, and opening files outside a folder of its own are bugs too (`watched`).
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import io
import os
import pickletools
import sys
import tarfile
import tempfile
import threading
import zipfile
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from ckptfix import api, pickles
from ckptfix.bytes.engine import check_crc
from ckptfix.bytes.source import BytesSource
from ckptfix.diagnose import document as diagnose
from ckptfix.errors import CkptfixError, UnsafeError
from ckptfix.formats import safetensors as safetensors_format
from ckptfix.formats import script_json, table, torch_legacy, torch_tar, torch_zip
from ckptfix.formats.zip import archive as zips
from ckptfix.layouts import table as layouts
from ckptfix.repair import recover
from ckptfix.tree import compare
from ckptfix.tree.document import Storage, Tensor
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ckptfix.pickles.machine import Persistent
    from ckptfix.tree.document import Document, Node

_LATE = [f"ckptfix.formats.{name}" for name in (*table.ORDER, "not_checkpoints", "zip.recovery")]
_LATE += [f"ckptfix.layouts.{name}" for name in layouts.FOLDERS]
# what ckptfix imports late, so that an import seen later is one that the bytes asked for
_CODECS = ("cp437", "raw-unicode-escape", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be",
           "utf-16", "utf-32", "utf-8-sig")  # fmt: skip
EARLY = (*map(import_module, _LATE), diagnose, recover, script_json, hashlib, heapq, tarfile,
         tempfile, *map(codecs.lookup, _CODECS))  # fmt: skip


class Trespass(BaseException):
    """What no reader may do. No `Exception`, so that none of them can swallow it."""


_FORBIDDEN = (
    "import", "exec", "compile", "marshal.", "pickle.", "subprocess.", "os.system", "os.exec",
    "os.spawn", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.truncate", "os.chmod",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "socket.", "ctypes.", "shutil.", "urllib.",
)  # fmt: skip
_ALLOWED = Path(tempfile.gettempdir()).resolve()
_watching: set[int] = set()


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if threading.get_ident() not in _watching:
        return
    if event.startswith(_FORBIDDEN):
        raise Trespass(f"{event} {args!r:.200}")
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = Path(os.path.realpath(os.fsdecode(args[0])))
        if not path.is_relative_to(_ALLOWED):
            raise Trespass(f"open {path}")


@contextmanager
def watched() -> Iterator[None]:
    """What runs inside raises `Trespass` where it leaves its bounds."""
    if _audit not in _installed:
        sys.addaudithook(_audit)  # cannot be removed again
        _installed.append(_audit)
    _watching.add(threading.get_ident())
    try:
        yield
    finally:
        _watching.discard(threading.get_ident())


_installed: list[Any] = []


def storages() -> Persistent:
    """What turns torch's persistent ids into storages, as the zip reader does."""
    known: dict[str, Storage] = {}

    def load(pid: Node) -> Storage:
        storage = torch_zip.parse_persistent_id(pid)
        first = known.setdefault(storage.key, storage)
        if (first.dtype, first.numel, first.device) != (
            storage.dtype, storage.numel, storage.device,
        ):  # fmt: skip
            raise UnsafeError("described in two ways")
        return first

    return load


def read_pickle(data: bytes) -> None:
    """Any persistent id is taken; the tree can be walked."""
    root, end = pickles.read(data, lambda pid: ("pid", pid), name="fuzz")
    assert 0 < end <= len(data)
    assert data[end - 1 : end] == b"."
    for _ in walk(root):
        pass


def rewrite_pickle(data: bytes) -> None:
    """What is read is written, and reads as the same; Python knows every opcode of it."""
    root, _ = pickles.read(data, storages(), name="fuzz")
    written, _ = pickles.write(root)
    with suppress(ValueError):  # pickletools knows fewer class names than Python does
        for _ in pickletools.genops(written):
            pass
    again, end = pickles.read(written, storages(), name="fuzz: written")
    assert end == len(written)
    place = compare.difference(root, again)
    assert place is None, f"reads back differently at {place}"


def read_zip(data: bytes) -> None:
    """What is accepted, Python's `zipfile` reads too, and finds the same in it."""
    archive = zips.read(BytesSource(data))
    spans = archive.spans
    whole = data[: archive.end]
    if not any(span.crc for span in spans.values() if span.length):
        return  # zipfile takes a CRC of zero for a wrong one
    for name, span in spans.items():
        check_crc(span, name)
    with suppress(NotImplementedError), zipfile.ZipFile(io.BytesIO(whole)) as peer:
        listed = {entry.filename: entry for entry in peer.infolist() if not entry.is_dir()}
        assert len(listed) == len(spans)
        for entry, span in zip(sorted(listed.values(), key=_place), spans.values(), strict=True):
            assert peer.read(entry) == span.read()


def _place(entry: zipfile.ZipInfo) -> int:
    return entry.header_offset


def read_torch_zip(data: bytes) -> None:
    """The directory, the pickle, and the bytes of each storage."""
    _bytes_are_there(torch_zip.read(BytesSource(data)))


def read_safetensors(data: bytes) -> None:
    """What is accepted, the safetensors library reads too, and finds the same in it."""
    document = safetensors_format.read(BytesSource(data))
    _bytes_are_there(document)
    peer = dict(safetensors.deserialize(data))
    aliases = {name for name in document.root if name not in peer}
    assert set(document.root) == peer.keys() | aliases
    for name, found in peer.items():
        assert bytes(found["data"]) == document.root[name].storage.spans[0].read()


def read_legacy(data: bytes) -> None:
    """Pickles one after another, then the bytes of each storage."""
    _bytes_are_there(torch_legacy.read(BytesSource(data)))


def read_tar(data: bytes) -> None:
    """Members that mix pickles and numbers."""
    _bytes_are_there(torch_tar.read(BytesSource(data)))


def open_file(data: bytes) -> None:
    """A file as a user opens it, and what `inspect` asks of it."""
    opened = api.open(_on_disk(data))
    _bytes_are_there(opened.document)
    assert all(finding.code for finding in opened.findings)
    assert all(state.path for state in opened.state_dicts)


_folder: list[tempfile.TemporaryDirectory[str]] = []


def _on_disk(data: bytes) -> str:
    path = os.path.join(_folder[0].name, "file.pt")
    with open(path, "wb") as file:
        file.write(data)
    return path


def _bytes_are_there(document: Document) -> None:
    for _, node in walk(document.root):
        if isinstance(node, Tensor) and node.storage.nbytes:
            assert sum(len(span.read()) for span in node.storage.spans) == node.storage.nbytes


TARGETS: dict[str, Callable[[bytes], None]] = {
    "pickle": read_pickle,
    "rewrite": rewrite_pickle,
    "zip": read_zip,
    "torchzip": read_torch_zip,
    "safetensors": read_safetensors,
    "legacy": read_legacy,
    "tar": read_tar,
    "file": open_file,
}


def run(name: str, data: bytes) -> bool:
    """Whether a target accepts the bytes; raises where it does what it must not."""
    if not _folder:
        _folder.append(tempfile.TemporaryDirectory(prefix="ckptfix-fuzz-"))
    with watched():
        try:
            TARGETS[name](data)
        except CkptfixError:
            return False
    return True
