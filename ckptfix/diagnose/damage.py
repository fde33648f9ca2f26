"""Read every byte of a checkpoint: are the checksums right, and are the numbers numbers?"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.checked import CheckedSource
from ckptfix.bytes.copy import check_crc
from ckptfix.contents.state_dicts import find
from ckptfix.errors import DamagedError
from ckptfix.findings import Finding
from ckptfix.hints import Hint, command
from ckptfix.pieces.scattered import ScatteredSource
from ckptfix.tree.walk import storages

if TYPE_CHECKING:
    from ckptfix.bytes.span import Span
    from ckptfix.torch_bridge.materialize import Materializer
    from ckptfix.tree.document import Document, Node, Storage, Tensor

_CHUNK = 1 << 22
"""Elements that are looked at together."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading all bytes has shown."""

    verified: int
    """Storages whose bytes have the checksum on record."""
    unverified: int
    """Storages of containers that keep no checksums; that is not damage."""
    damaged: list[str]
    """Messages, one for each storage whose bytes are not those that were saved."""
    nan: dict[str, int]
    """Path of each tensor that holds NaN, and how many."""
    inf: dict[str, int]
    """Path of each tensor that holds infinities, and how many."""

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)

    @property
    def is_sound(self) -> bool:
        """Whether no damage was found. NaN and infinities are what was saved."""
        return not self.damaged


def read_data(document: Document) -> Reading:
    """Check every checksum, on as many threads as there are cores, and count NaN and infinities."""
    held = list(storages(document.root))
    damaged = [error.message for error in _wrong(document, held)]
    verified = sum(all(map(_is_checked, storage.spans)) for storage in held)
    nan, inf = ({}, {}) if damaged else _not_numbers(document)
    return Reading(verified - len(damaged), len(held) - verified, damaged, nan, inf)


_CHECKED = (CheckedSource, ScatteredSource)
"""Sources that know the checksums of what they are made of."""


def _is_checked(span: Span) -> bool:
    """Whether the bytes of a span have a checksum on record, or belong to some that have."""
    return span.crc is not None or (isinstance(span.source, _CHECKED) and span.source.is_checked)


def check_sums(document: Document) -> None:
    """Raise `DamagedError` where the bytes that a document is made of have a wrong checksum."""
    for label, span in document.extras.items():
        check_crc(span, repr(label))
    check_tensors(document, document.root)


def check_tensors(document: Document, node: Node) -> None:
    """Raise `DamagedError` where the bytes of a tensor below a node have a wrong checksum."""
    wrong = _wrong(document, list(storages(node)))
    if wrong:
        hint = Hint("save what is whole", command("recover", document.name, "OUT"))
        first = wrong[0]
        raise DamagedError(first.what, where=first.where, hint=hint, code="crc-mismatch")


def _wrong(document: Document, held: list[Storage]) -> list[DamagedError]:
    """The errors of the storages with a wrong checksum; on as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        wrong = [one for one, error in zip(held, pool.map(_damage, held), strict=True) if error]
    names: dict[int, str] = {}
    for state in find(document.root) if wrong else ():
        names.update((id(tensor.storage), key) for key, tensor in state.tensors.items())
    errors = (_damage(storage, names.get(id(storage))) for storage in wrong)
    return [error for error in errors if error is not None]


def findings(reading: Reading) -> list[Finding]:
    """What reading has shown, as findings."""
    rows = [Finding("crc-mismatch", message) for message in reading.damaged]
    for code, what, counts in (
        ("nan-values", "NaN", reading.nan),
        ("inf-values", "inf", reading.inf),
    ):
        rows += [Finding(code, f"{count:,} {what}", path) for path, count in counts.items()]
    return rows


def _damage(storage: Storage, name: str | None = None) -> DamagedError | None:
    """What is wrong with the bytes of a storage, with its tensor's name if that is known."""
    label = f"storage {storage.key!r}" + (f" ({name})" if name else "")
    try:
        for span in storage.spans:
            check_crc(span, label)
            if isinstance(span.source, _CHECKED):
                span.source.check()
    except DamagedError as error:
        return error
    return None


def _not_numbers(document: Document) -> tuple[dict[str, int], dict[str, int]]:
    from ckptfix.torch_bridge.materialize import Materializer

    materializer = Materializer(byteorder=document.byteorder)
    nan: dict[str, int] = {}
    inf: dict[str, int] = {}
    for state in find(document.root):
        if state.role == "optimizer":
            continue
        for key, tensor in state.tensors.items():
            path = key if state.path == "/" else f"{state.path}/{key}"
            nans, infs = _count(tensor, materializer)
            nan.update({path: nans} if nans else {})
            inf.update({path: infs} if infs else {})
    return nan, inf


def _count(tensor: Tensor, materializer: Materializer) -> tuple[int, int]:
    """NaN and infinities in a tensor, looked at in pieces so that memory does not grow."""
    import torch

    if not tensor.dtype.name.startswith(("float", "bfloat", "complex")) or not tensor.numel:
        return 0, 0
    made = materializer.tensor(tensor).detach()
    if made.dtype in (torch.complex32, torch.complex64, torch.complex128):
        made = torch.view_as_real(made.resolve_conj().resolve_neg())
    if made.dtype == getattr(torch, "float4_e2m1fn_x2", None):  # has neither
        return 0, 0
    nans = infs = 0
    for piece in torch.split(made.reshape(-1), _CHUNK) if made.is_contiguous() else (made,):
        numbers = piece.float() if made.element_size() < 4 else piece
        nans += int(torch.isnan(numbers).sum())
        infs += int(torch.isinf(numbers).sum())
    return nans, infs
