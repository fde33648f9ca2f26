"""Whatever holds tensors, as `pickle.dump` writes it: one pickle, no container.

A tensor's storage is pickled as `torch.storage._load_from_bytes(bytes)`, where the bytes are a
checkpoint of their own (legacy or zip) that holds nothing but the storage. Numpy arrays are pickled
with their bytes. Source: `torch.storage.TypedStorage.__reduce__`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ckptfix import pickles
from ckptfix.bytes.source import BytesSource
from ckptfix.errors import DamagedError, NotACheckpointError, UnsafeError
from ckptfix.findings import Finding
from ckptfix.formats import not_checkpoints, torch_legacy, torch_zip
from ckptfix.limits import DEFAULT, Limits
from ckptfix.pickles.torch_objects import BUILDERS
from ckptfix.tree.document import Document, Global, Node, Storage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage
    from ckptfix.pickles.torch_objects import Arguments, Builder

NAME = "plain pickle"
_TEXT_STARTS = b"(c]}l"
_STOP = b"."
_SCALARS = (int, float, str, bytes, type(None))


def recognises(source: Source) -> bool:
    """Whether a file may be a pickle: it says so, or begins and ends as one of protocol 0 or 1."""
    head = source.head()
    if _says_so(head):
        return len(head) > 2 and 2 <= head[1] <= 5
    return bool(head) and head[0] in _TEXT_STARTS and source.read(source.size - 1, 1) == _STOP


def _says_so(head: bytes) -> bool:
    return head[:1] == b"\x80"


def read(
    source: Source,
    limits: Limits = DEFAULT,
    builders: Mapping[Global, Builder] | None = None,
    named: list[Global] | None = None,
) -> Document:
    """The document in a plain pickle. Weights are part of a pickle, and are read with it.

    `builders` are further calls that are understood; into `named` goes every class and function
    that it names.
    """
    try:
        return _read(source, limits, builders, named)
    except DamagedError:
        if _says_so(source.head()):
            raise
        raise not_checkpoints.explain(source) from None


def salvage(source: Source, found: Salvage) -> Document:
    """As `read`: nothing in a pickle that ends too soon can be believed."""
    return _read(source, found.limits)


def _read(
    source: Source,
    limits: Limits,
    builders: Mapping[Global, Builder] | None = None,
    named: list[Global] | None = None,
) -> Document:
    other = not_checkpoints.pickled(source)
    if other is not None:
        raise other
    if source.size > limits.pickle_bytes:
        raise UnsafeError(
            f"is a pickle of {source.size} bytes, more than are read", where=source.name
        )
    refused = "it is a pickle without a container, which torch.load refuses"
    notes = [Finding("container-refused", refused)]
    data, start = torch_legacy.mapped(source)
    try:
        root, end = pickles.read(
            data,
            _refuse,
            name=source.name,
            start=start,
            limits=limits,
            builders={**BUILDERS, _STORAGE: partial(_storage, notes), **(builders or {})},
            notes=notes,
            named=named,
        )
    except _LonePickleError:
        raise NotACheckpointError(
            "is data.pkl of a torch archive by itself: the tensors lie in the other files of it",
            where=source.name,
            hint="unpack the whole archive, and give its folder; or give the archive",
            code="lone-pickle",
        ) from None
    surplus = start + source.size - end
    if surplus and isinstance(root, _SCALARS):  # as where the magic number of a legacy file is torn
        raise DamagedError(
            f"holds one {type(root).__name__}, then {surplus} bytes that are not a pickle",
            where=source.name,
            hint="the file is damaged: copy or download it again",
        )
    if surplus:
        notes.append(Finding("trailing-bytes", f"{surplus} bytes follow the end of the pickle"))
    return Document(root, NAME, source.name, source.size, notes=tuple(notes))


def _storage(notes: list[Finding], args: Arguments, limits: Limits) -> Storage | None:
    """`_load_from_bytes(b)`: the storage that is the root of the checkpoint in `b`.

    Loading runs what that checkpoint calls beside it, so it is noted.
    """
    if len(args) != 1 or type(args[0]) is not bytes:
        return None
    inner = BytesSource(args[0], "a storage in the pickle")
    found = (torch_zip if torch_zip.recognises(inner) else torch_legacy).read(inner, limits)
    if not isinstance(found.root, Storage):
        return None
    notes += [note for note in found.notes if note.code in _BESIDE and note not in notes]
    return found.root


_STORAGE = Global("torch.storage", "_load_from_bytes")
_BESIDE = frozenset({"hidden-call", "left-on-stack"})


def _refuse(pid: Node) -> Node:
    if type(pid) is tuple and pid[:1] == ("storage",):
        raise _LonePickleError("a storage is named in a pickle that has no container")
    raise UnsafeError("a persistent id stands in a pickle that has no container")


class _LonePickleError(NotACheckpointError):
    """A pickle speaks of tensors that lie elsewhere."""
