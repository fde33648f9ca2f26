"""Files that are found where a checkpoint should be, recognised by their bytes."""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING

from ckptfix.bytes.place import Place
from ckptfix.errors import DamagedError, NotACheckpointError, UnsupportedError
from ckptfix.hints import Hint, filtering, shell

if TYPE_CHECKING:
    from ckptfix.bytes.source import Source
    from ckptfix.errors import ReadError
    from ckptfix.hints import Command

_LFS = b"version https://git-lfs"
_HTML = re.compile(rb"\s*(<!doctype|<html|<head|<\?xml|<!--)", re.IGNORECASE)
_JSON = re.compile(rb'\s*([\[{]\s*["\[{\]}]|\{\s*$)')
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"Rar!": "rar",
}
_ARCHIVERS = {"7z": "7z", "rar": "unrar"}
_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras or h5py)",
    b"GGUF": "a GGUF file (llama.cpp)",
    b"\x93NUMPY": "a numpy array",
    b"\x08\x01\x12": "an ONNX model",
    b"\x89PNG": "a PNG picture",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}


def explain(source: Source) -> ReadError:
    """The error for a file that no format recognises: what it is, and what to do about it."""
    head, name = source.head(), source.name
    if not head:
        return NotACheckpointError("the file is empty", where=name, hint=_AGAIN, code="empty")
    if head.startswith(_LFS):
        return NotACheckpointError(
            "is a git-lfs pointer, not the file that it stands for",
            where=name,
            hint=Hint("fetch it", shell("git", "lfs", "pull", "--include", files=[name])),
            code="lfs-pointer",
        )
    if _HTML.match(head):
        return NotACheckpointError(
            "is an HTML page, as a download link gives where it wants a login",
            where=name,
            hint=Hint("see what it says", shell("head", "-c", "400", files=[name])),
            code="html",
        )
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            return UnsupportedError(
                f"is packed with {kind}",
                where=name,
                hint=Hint("unpack it first", unpacking(kind, name)),
                code="packed",
            )
    if head[257:262] == b"ustar":
        what = "is a tar archive in another archive, and not a checkpoint"
        return NotACheckpointError(
            what, where=name, hint="unpack both yourself, and give what is inside"
        )
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            what = f"is {kind}, not a checkpoint of PyTorch"
            return NotACheckpointError(what, where=name, hint=_see(name))
    return _plain(source, head)


def unpacking(kind: str, name: str) -> Command:
    """The command that unpacks a file, whatever its name ends with; it writes over nothing."""
    if kind in _ARCHIVERS:
        return shell(_ARCHIVERS[kind], "x", files=[name])
    names = (f"{name}.unpacked{number or ''}" for number in count())
    free = next(each for each in names if not Place(each).exists)
    return filtering(kind, "-dc", reads=name, writes=free)


def _plain(source: Source, head: bytes) -> ReadError:
    name = source.name
    if _JSON.match(head):
        return NotACheckpointError(
            "is a JSON text, not a checkpoint",
            where=name,
            hint=Hint("see what it says", shell("head", "-c", "400", files=[name])),
            code="json",
        )
    if not head.strip(b"\0"):
        what = f"begins with {len(head)} zero bytes, as a broken copy or download does"
        return DamagedError(what, where=name, hint=_AGAIN, code="zeros")
    if len(head) < 9 or b"PK\x03\x04".startswith(head[:4]):
        what = f"has only {source.size} bytes, too few for a checkpoint"
        return DamagedError(what, where=name, hint=_AGAIN, code="too-short")
    what = f"is not a checkpoint that ckptfix knows (begins with {head[:8].hex(' ')})"
    return NotACheckpointError(what, where=name, hint=_see(name))


_AGAIN = "copy or download it again"


def _see(name: str) -> Hint:
    return Hint("see what it is", shell("file", files=[name]))
