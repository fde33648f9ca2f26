"""Read every byte of a checkpoint: are the checksums right, and are the numbers numbers?

Each byte is read once, by several workers; only what turns out to hold NaN or infinities is read
again, to say how many. torch is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from isal import isal_zlib

from ckptfix.bytes.engine import blocks, check_crc, in_order, look, wrong_sum
from ckptfix.bytes.source import FileSource, everything
from ckptfix.bytes.span import Span, cut
from ckptfix.bytes.sums import joined
from ckptfix.contents.labels import label
from ckptfix.contents.state_dicts import find
from ckptfix.edit.compacting import gathered
from ckptfix.errors import DamagedError
from ckptfix.findings import Finding
from ckptfix.hints import Hint, command
from ckptfix.tree import floats
from ckptfix.tree.walk import storages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptfix.bytes.engine import Progress
    from ckptfix.tree.document import Document, Node, Storage, Tensor


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

    @property
    def is_sound(self) -> bool:
        """Whether no damage was found. NaN and infinities are what was saved."""
        return not self.damaged


def read_data(document: Document, progress: Progress | None = None) -> Reading:
    """Check every checksum, and count NaN and infinities in the tensors of models."""
    held = list(storages(document.root))
    tensors = dict(_of_models(document.root))
    kinds: dict[int, set[str]] = {}
    for tensor in tensors.values():
        kind = floats.part(tensor.dtype)
        if kind is not None and tensor.numel:
            kinds.setdefault(id(tensor.storage), set()).add(kind)
    damaged, finite, verified = [], set(), 0
    for storage, seen in zip(held, _seen(held, kinds, document, progress), strict=True):
        if not seen.is_sound:
            damaged.append(seen.damage(document.root, storage).message)
            continue
        verified += all(map(_is_checked, storage.spans))
        if seen.is_finite:
            finite.add(id(storage))
    unverified = len(held) - verified - len(damaged)
    _check_unchanged(held)
    damaged += [error.message for error in _wrong_records(document)]
    nan: dict[str, int] = {}
    inf: dict[str, int] = {}
    for path, tensor in tensors.items() if not damaged else ():
        if id(tensor.storage) not in finite:
            nans, infs = _count(tensor, document.byteorder)
            nan.update({path: nans} if nans else {})
            inf.update({path: infs} if infs else {})
    return Reading(verified, unverified, damaged, nan, inf)


def _is_checked(span: Span) -> bool:
    """Whether the bytes of a span have a checksum on record, or belong to some that have."""
    return span.crc is not None or span.source.is_checked


def _check_unchanged(held: Iterable[Storage]) -> None:
    """Raise `ReadError` where a file was written to while it was read."""
    sources = {id(span.source): span.source for storage in held for span in storage.spans}
    files = {id(one): one for source in sources.values() for one in everything(source)}
    for one in files.values():
        if isinstance(one, FileSource):
            one.check()


def check_tensors(document: Document, node: Node) -> None:
    """Raise `DamagedError` where the bytes of a tensor below a node have a wrong checksum."""
    held = list(storages(node))
    for storage, seen in zip(held, _seen(held, {}, document), strict=True):
        if not seen.is_sound:
            hint = Hint("save what is whole", command("recover", document.name, "OUT"))
            first = seen.damage(document.root, storage)
            raise DamagedError(first.what, where=first.where, hint=hint, code="crc-mismatch")


def _wrong_records(document: Document) -> Iterator[DamagedError]:
    """The errors of further records: those of no tensor."""
    for name, span in document.extras.items():
        try:
            check_crc(span, repr(name))
        except DamagedError as error:
            yield error


def findings(reading: Reading) -> list[Finding]:
    """What reading has shown, as findings."""
    rows = [Finding("crc-mismatch", message) for message in reading.damaged]
    for code, what, counts in (
        ("nan-values", "NaN", reading.nan),
        ("inf-values", "inf", reading.inf),
    ):
        rows += [Finding(code, f"{count:,} {what}", path) for path, count in counts.items()]
    return rows


# --- one pass


class _Block(NamedTuple):
    """A block of a storage, and the kinds of numbers that tensors see in it."""

    span: Span
    kinds: Iterable[str]
    byteorder: str

    @property
    def length(self) -> int:
        return self.span.length


class _Seen(NamedTuple):
    """What was seen in a block, or in a whole storage."""

    crc: int = 0
    is_finite: bool = True
    error: DamagedError | None = None
    """Why bytes could not be read."""
    wrong: Span | None = None
    """A span that does not have the checksum on record."""

    @property
    def is_sound(self) -> bool:
        return self.error is None and self.wrong is None

    def damage(self, root: Node, storage: Storage) -> DamagedError:
        """The error that says which tensor is damaged."""
        name = label(root, storage)
        if self.error is None:
            assert self.wrong is not None
            return wrong_sum(self.wrong, name)
        what = f"{name}: {self.error.what}"
        return DamagedError(
            what, where=self.error.where, hint=self.error.hint, code=self.error.code
        )


def _seen(
    held: Sequence[Storage],
    kinds: dict[int, set[str]],
    document: Document,
    progress: Progress | None = None,
) -> Iterator[_Seen]:
    """What reading each storage shows, in order."""
    made = in_order(
        _look,
        (
            _Block(block, kinds.get(id(storage), ()), document.byteorder)
            for storage in held
            for block in blocks(storage.spans)
        ),
        progress,
    )
    for storage in held:
        whole = _Seen()
        for span in storage.spans:
            crc = 0
            for block in blocks((span,)):
                seen = next(made)
                crc = joined(crc, seen.crc, block.length)
                finite, error = whole.is_finite and seen.is_finite, whole.error or seen.error
                whole = whole._replace(is_finite=finite, error=error)
            if span.crc not in (None, crc):
                whole = whole._replace(wrong=whole.wrong or span)
            if span.crc is None and span.source.is_checked:
                whole = whole._replace(error=whole.error or _damage_of_parts(span))
        yield whole


def _damage_of_parts(span: Span) -> DamagedError | None:
    """What is wrong with what a source is made of, where that has checksums on record."""
    try:
        for source in everything(span.source):
            source.check()
    except DamagedError as error:
        return error
    return None


def _look(block: _Block) -> _Seen:
    try:
        data = look(block.span)
    except DamagedError as error:
        return _Seen(error=error)
    finite = all(_is_finite(data, kind, block.byteorder) for kind in block.kinds)
    return _Seen(isal_zlib.crc32(data), finite)


def _is_finite(data: memoryview, kind: str, byteorder: str) -> bool:
    size = _size(kind)
    if len(data) % size:  # then a closer look tells
        return False
    return floats.is_finite(floats.words(data, size, byteorder), kind)


def _size(kind: str) -> int:
    return floats.FORMS[kind].bits // 8 if kind in floats.FORMS else 1


# --- a closer look


def _of_models(root: Node) -> Iterator[tuple[str, Tensor]]:
    for state in find(root):
        if state.role != "optimizer":
            for key, tensor in state.tensors.items():
                yield key if state.path == "/" else f"{state.path}/{key}", tensor


def _count(tensor: Tensor, byteorder: str) -> tuple[int, int]:
    """NaN and infinities in a tensor."""
    kind = floats.part(tensor.dtype)
    if kind is None or not tensor.numel:
        return 0, 0
    begin = tensor.offset * tensor.dtype.itemsize
    spans = cut(tensor.storage.spans, begin, tensor.nbytes)
    if not tensor.is_contiguous or len(spans) > 1:
        spans, byteorder = (gathered(tensor, byteorder),), "little"

    def counted(block: Span) -> tuple[int, int]:
        return floats.count(floats.words(look(block), _size(kind), byteorder), kind)

    rows = list(in_order(counted, blocks(spans)))
    return sum(nans for nans, _ in rows), sum(infs for _, infs in rows)
