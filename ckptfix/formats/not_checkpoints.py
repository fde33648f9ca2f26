"""Files that are found where a checkpoint should be, recognised by their bytes."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from ckptfix.errors import DamagedError, NotACheckpointError, UnsupportedError

if TYPE_CHECKING:
    from ckptfix.bytes.source import Source
    from ckptfix.errors import ReadError

_LFS = b"version https://git-lfs"
_HTML = re.compile(rb"\s*(<!doctype|<html|<head|<\?xml|<!--)", re.IGNORECASE)
_JSON = re.compile(rb'\s*([\[{]\s*["\[{\]}]|\{\s*$)')
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"Rar!": ("rar", "unrar x"),
}
_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras or h5py)",
    b"GGUF": "a GGUF file (llama.cpp)",
    b"\x93NUMPY": "a numpy array",
    b"\x08\x01\x12": "an ONNX model",
    b"\x89PNG": "a PNG picture",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}


def explain(source: Source, head: bytes) -> ReadError:
    """The error for a file that no container recognises: what it is, and what to do about it."""
    name, quoted = source.name, shlex.quote(source.name)
    if not head:
        return NotACheckpointError(
            f"{name}: the file is empty", hint="copy or download it again", code="empty"
        )
    if head.startswith(_LFS):
        return NotACheckpointError(
            f"{name}: a git-lfs pointer, not the file that it stands for",
            hint=f"fetch it: git lfs pull --include {quoted}",
            code="lfs-pointer",
        )
    if _HTML.match(head):
        return NotACheckpointError(
            f"{name}: an HTML page, as a download link gives where it wants a login",
            hint=f"see what it says: head -c 400 {quoted}",
            code="html",
        )
    for magic, (kind, command) in _PACKED.items():
        if head.startswith(magic):
            return UnsupportedError(
                f"{name}: packed with {kind}",
                hint=f"unpack it first: {command} {quoted}",
                code="packed",
            )
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            return NotACheckpointError(
                f"{name}: {kind}, not a checkpoint of PyTorch",
                hint=f"see what it is: file {quoted}",
            )
    return _plain(source, head, quoted)


def _plain(source: Source, head: bytes, quoted: str) -> ReadError:
    name = source.name
    if _JSON.match(head):
        return NotACheckpointError(
            f"{name}: a JSON text, not a checkpoint",
            hint=f"see what it says: head -c 400 {quoted}",
            code="json",
        )
    if not head.strip(b"\0"):
        return DamagedError(
            f"{name}: begins with {len(head)} zero bytes, as a broken copy or download does",
            hint="copy or download it again",
            code="zeros",
        )
    if len(head) < 9 or b"PK\x03\x04".startswith(head[:4]):
        return DamagedError(
            f"{name}: only {source.size} bytes, too few for a checkpoint",
            hint="copy or download it again",
            code="too-short",
        )
    return NotACheckpointError(
        f"{name}: not a checkpoint that ckptfix knows (begins with {head[:8].hex(' ')})",
        hint=f"see what it is: file {quoted}",
    )
