"""Files that are found where a checkpoint should be, recognised by their bytes.

What is sound and of another kind is called by its name, never damaged. A file is looked at as far
as its head; where a kind has no magic number, several of its fields have to make sense.
"""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.place import Place
from ckptfix.errors import DamagedError, NotACheckpointError, UnsupportedError
from ckptfix.hints import Hint, filtering, shell

if TYPE_CHECKING:
    from ckptfix.bytes.source import Source
    from ckptfix.errors import ReadError
    from ckptfix.hints import Command

_LFS = b"version https://git-lfs"
_HTML = re.compile(rb"\s*(<!doctype|<html|<head|<\?xml|<!--)", re.IGNORECASE)
_REFUSAL = re.compile(rb"<Error>\s*<Code>(\w{1,60})</Code>")
_JSON = re.compile(rb'\s*([\[{]\s*["\[{\]}]|\{\s*$)')
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4}\s{0,2}){16,}")
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"Rar!": "rar",
}
_ARCHIVERS = {"7z": "7z", "rar": "unrar"}


class Kind(NamedTuple):
    """A kind of file that is sound, and no checkpoint of torch's."""

    begins: re.Pattern[bytes]
    what: str
    hint: Hint | str | None = None
    """What to do about it; None: see what it is."""


def _kind(begins: bytes, what: str, hint: Hint | str | None = None) -> Kind:
    return Kind(re.compile(begins, re.DOTALL), what, hint)


_ITS_LIBRARY = "load it with its own library, and save its weights with safetensors there"
_KINDS = (
    _kind(rb"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or h5py)", _ITS_LIBRARY),
    _kind(rb"GGUF", "a GGUF file (llama.cpp)", _ITS_LIBRARY),
    _kind(rb"lmgg|fmgg|tjgg|algg", "a GGML file (an older llama.cpp or whisper.cpp)", _ITS_LIBRARY),
    _kind(rb"24ka", "a file of llama2.c", _ITS_LIBRARY),
    _kind(rb"\x93NUMPY", "a numpy array (.npy)", "load it with numpy.load"),
    _kind(rb"\x08[\x02-\x14]\x12.[\w .:-]", "an ONNX model", "load it with onnx or onnxruntime"),
    _kind(rb"\x08\x01\x12", "a TensorFlow SavedModel", "load it with TensorFlow"),
    _kind(rb".{4}TFL3", "a TensorFlow Lite model", "load it with TensorFlow"),
    _kind(rb".{4}E[TP]\d\d", "an ExecuTorch program (.pte)", "take the model that it was made of"),
    _kind(
        rb"[\x03\x04]\0\0\0\x01\0\0\0\x03\0\0\0V 1|\x03\0\0\0\x01\0\0\0.{3}\0[\x01-\x08]\0\0\0",
        "a file of Torch7 (Lua)",
        "read it with torchfile or with `torch.utils.serialization.load_lua` of torch 0.4",
    ),
    _kind(
        rb"(?:[\x81-\x8f]|\xde\0.|\xdf\0..{2})[\xa1-\xbf][A-Za-z_]\w*[\x80-\xff]",
        "a MessagePack file (Flax)",
        "load it with flax.serialization, and save its arrays with safetensors.flax",
    ),
    _kind(rb"\x12\x01\0{6}", "a file of MXNet (.params)", _ITS_LIBRARY),
    _kind(rb"\0\0\0\0[\x01\x02]\0\0\0[\0-\x05]\0\0\0.{4}", "weights of Darknet", _ITS_LIBRARY),
    _kind(
        rb"\n[\x02-\x7f]\n(.)[\w.-]+\x12|\n[\x80-\xff]{1,4}[\x01-\x7f]\n(.)[\w.-]+\x12",
        "a checkpoint of MindSpore",
        "load it with mindspore.load_checkpoint",
    ),
    _kind(rb"bplist00.*NSURL", "a placeholder of iCloud, not the file that it stands for",
          "let Finder download it (Download Now), or run `brctl download` with it"),
    _kind(rb"\0\x05\x16\x07", "what macOS keeps beside a file (AppleDouble), not the file",
          "take the file whose name lacks the leading `._`"),
    _kind(rb"# xet version", "a pointer of git-xet, not the file that it stands for",
          "fetch it: git xet checkout"),
    _kind(rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture"),
    _kind(rb"%PDF", "a PDF document"),
    _kind(rb"\x7fELF|MZ.{58}\0\0|\xcf\xfa\xed\xfe|\xfe\xed\xfa", "a program or a library, as "
          "AOTInductor makes of a model", "take the checkpoint of the model that was compiled"),
    _kind(rb"PAR1", "a Parquet table"),
    _kind(rb"ARROW1", "an Arrow table"),
    _kind(rb"SQLite format 3\0", "an SQLite database"),
    _kind(rb"MATLAB \d", "a MATLAB file", "load it with scipy.io.loadmat"),
    _kind(rb"x[\x01\x5e\x9c\xda]", "a file that joblib packed with zlib",
          "load it with joblib.load"),
    _kind(rb"outs:\s|wdir:|md5: [0-9a-f]{32}", "a pointer of DVC, not the file that it stands for",
          "fetch it: dvc pull"),
    _kind(rb"[./]*(?:\.git)?/annex/objects/", "a pointer of git-annex, not the file that it stands "
          "for", "fetch it: git annex get"),
)  # fmt: skip


def explain(source: Source) -> ReadError:
    """The error for a file that no format recognises: what it is, and what to do about it."""
    return named(source) or _unknown(source, source.head())


def named(source: Source) -> ReadError | None:
    """The error for a file that is something else; None for bytes that say nothing."""
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
    for known in _KINDS:
        if known.begins.match(head):
            what = f"is {known.what}, not a checkpoint of PyTorch"
            return NotACheckpointError(what, where=name, hint=known.hint or _see(name))
    return _text(head, name) or _without_magic(head, name)


def unpacking(kind: str, name: str) -> Command:
    """The command that unpacks a file, whatever its name ends with; it writes over nothing."""
    if kind in _ARCHIVERS:
        return shell(_ARCHIVERS[kind], "x", files=[name])
    names = (f"{name}.unpacked{number or ''}" for number in count())
    free = next(each for each in names if not Place(each).exists)
    return filtering(kind, "-dc", reads=name, writes=free)


def _text(head: bytes, name: str) -> ReadError | None:
    """The error for a page, an answer in JSON, or bytes that were written as letters."""
    see = Hint("see what it says", shell("head", "-c", "400", files=[name]))
    refusal = _REFUSAL.search(head)
    if refusal is not None:
        what = f"is the answer of a storage service ({refusal[1].decode()}), not a checkpoint"
        return NotACheckpointError(what, where=name, hint=see, code="html")
    if _HTML.match(head):
        what = "is an HTML page, as a download link gives where it wants a login"
        return NotACheckpointError(what, where=name, hint=see, code="html")
    if _JSON.match(head):
        return NotACheckpointError(
            "is a JSON text, not a checkpoint", where=name, hint=see, code="json"
        )
    if _BASE64.match(head) and b" " not in head.strip():
        what = "is a text in base64, not the file that was written as one"
        return NotACheckpointError(what, where=name, hint="decode it: base64 -d IN > OUT")
    return None


def _without_magic(head: bytes, name: str) -> ReadError | None:
    """The error for kinds whose first fields are numbers, where all of them make sense."""
    what = _torchsharp(head) or _llama2c(head)
    if what is None:
        return None
    return NotACheckpointError(
        f"is {what}, not a checkpoint of PyTorch", where=name, hint=_ITS_LIBRARY
    )


def _torchsharp(head: bytes) -> str | None:
    """TorchSharp's `save`: how many entries, then for each the length of its name, name, type."""
    match = re.match(rb"(?:[\x01-\x7f]|[\x80-\xff][\x01-\x7f])([\x02-\x7f])", head)
    if match is None:
        return None
    end = match.end() + match[1][0]
    entry = re.compile(rb"[A-Za-z]\w*(?:\.\w+)*")
    whole = entry.fullmatch(head, match.end(), end)
    typed = head[end : end + 1] and head[end] <= 15 and head[end + 1 : end + 2]
    return "a file of TorchSharp" if whole and typed and head[end + 1] <= 8 else None


def _llama2c(head: bytes) -> str | None:
    """llama2.c's first export: seven numbers, which are the sizes of a model."""
    if len(head) < 28:
        return None
    fields = [int.from_bytes(head[i : i + 4], "little", signed=True) for i in range(0, 28, 4)]
    dim, hidden, layers, heads, kv_heads, vocabulary, length = fields
    sensible = (
        16 <= dim <= 1 << 16
        and dim < hidden <= 16 * dim
        and 1 <= layers <= 512
        and 1 <= kv_heads <= heads <= dim
        and dim % heads == 0
        and heads % kv_heads == 0
        and 64 <= abs(vocabulary) <= 1 << 20
        and 16 <= length <= 1 << 20
    )
    return "a file of llama2.c" if sensible else None


def _unknown(source: Source, head: bytes) -> ReadError:
    name = source.name
    if not head.strip(b"\0"):
        what = f"begins with {len(head)} zero bytes, as a broken copy or download does"
        return DamagedError(what, where=name, hint=_AGAIN, code="zeros")
    if len(head) < 9 or b"PK\x03\x04".startswith(head[:4]):
        what = f"has only {source.size} bytes, too few for a checkpoint"
        return DamagedError(what, where=name, hint=_AGAIN, code="too-short")
    what = f"is not a checkpoint that ckptfix knows (begins with {head[:8].hex(' ')})"
    return NotACheckpointError(what, where=name, hint=_see(name))


def pickled(source: Source) -> ReadError | None:
    """The error for a pickle that is no checkpoint: joblib's, which has arrays between opcodes."""
    if b"joblib.numpy_pickle" not in source.head():
        return None
    what = "is a file of joblib (scikit-learn), not a checkpoint of PyTorch"
    return NotACheckpointError(what, where=source.name, hint="load it with joblib.load")


def transferred_as_text(source: Source) -> bool:
    """Whether every line feed at the beginning of a file has a carriage return before it.

    So it is where a program took bytes for text (FTP in ASCII mode, git's autocrlf), and by chance
    in one file of 256 to the power of their number.
    """
    beginning = source.read(0, min(source.size, _LOOKED_AT))
    feeds = beginning.count(b"\n")
    return feeds >= _FEWEST and feeds == beginning.count(b"\r\n")


_LOOKED_AT, _FEWEST = 1 << 16, 4
_AGAIN = "copy or download it again"


def _see(name: str) -> Hint:
    return Hint("see what it is", shell("file", files=[name]))
