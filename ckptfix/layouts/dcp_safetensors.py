"""Pieces in safetensors files, as `torch.distributed.checkpoint` writes them for Hugging Face.

    shard-00001-model-00001-of-00002.safetensors    of rank 0: its pieces of what is to be in the
    shard-00002-model-00001-of-00002.safetensors    first of two files; of rank 1; …
    shard-00001-model-00002-of-00002.safetensors

There is no index. Each file is a whole safetensors file whose `__metadata__` has `DCP_VERSION` and
`DCP_SHARDING_INFO`: JSON that maps the name of each tensor in it to `{"saved_offsets": [0, 3]}`,
where in the whole the piece begins. The shape of the whole is written nowhere: it reaches as far as
the pieces do, so that a last rank whose files are missing is only seen by a gap in the numbers, or
by nothing at all; that is said. What every rank has lies in the file of one of them. Source:
`torch.distributed.checkpoint.hf_storage` and `._hf_utils` (2.8 to 2.13).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ckptfix.errors import CkptfixError, DamagedError, UnsafeError
from ckptfix.findings import Finding
from ckptfix.hints import Hint, shell
from ckptfix.layouts import in_pieces
from ckptfix.tree.document import Document, OrderedMap
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptfix.bytes.place import Place
    from ckptfix.formats.reading import Reading
    from ckptfix.pieces.joining import Piece

NAME = in_pieces.DCP_SAFETENSORS

_INFO = "DCP_SHARDING_INFO"
_OWN = frozenset({_INFO, "DCP_VERSION"})
_FILE = re.compile(r"shard-(\d{5,})-model-(\d{5,})-of-(\d{5,})\.safetensors")


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder of such files; None for other folders. Raises `ReadError`."""
    files = sorted(_numbered(folder.names()))
    if not files:
        return None
    from ckptfix.formats import table

    parts = [table.read_place(folder.below(name), reading) for *_, name in files]
    if not all(_INFO in part.metadata for part in parts):
        return None
    _check_numbers(files, folder)
    texts = (set(part.metadata.items()) for part in parts)
    return Document(
        _joined(parts, _absent(files, parts), folder, reading),
        NAME,
        folder.name,
        sum(part.nbytes for part in parts),
        metadata={key: text for key, text in sorted(set.intersection(*texts)) if key not in _OWN},
        notes=(*dict.fromkeys(note for part in parts for note in part.notes), _unproven(files)),
    )


def of_file(document: Document, place: Place, reading: Reading) -> Document | None:
    """The document of which the file at `place` is one; None for other safetensors files."""
    if _INFO not in document.metadata or not _FILE.fullmatch(place.base):
        return None
    return of_folder(place.folder, reading)


def _numbered(names: Iterable[str]) -> Iterator[tuple[int, int, int, str]]:
    """Of each such file: which file it is to be in, its rank (from 1), of how many, its name."""
    for name in names:
        found = _FILE.fullmatch(name)
        if found:
            rank, number, total = map(int, found.groups())
            yield number, rank, total, name


def _check_numbers(files: list[tuple[int, int, int, str]], folder: Place) -> None:
    totals = {total for _, _, total, _ in files}
    if len(totals) > 1:
        what = f"holds files of different saves: of {listed(map(str, sorted(totals)))}"
        raise UnsafeError(what, where=folder, hint="keep those of one save only")
    ranks = {rank for _, rank, _, _ in files}
    numbers = {number for number, _, _, _ in files}
    absent = [f"shard-{rank:05d}-…" for rank in range(1, max(ranks)) if rank not in ranks]
    absent += [f"…-model-{number:05d}-of-…" for number in _up_to(totals.pop(), numbers)]
    if absent:
        raise DamagedError(
            f"lacks files of pieces: {listed(absent)}",
            where=folder,
            hint=_see(folder),
            code="piece-missing",
        )


def _see(folder: Place) -> Hint:
    return Hint(
        "copy or download what is missing too; see what is there", shell("ls", files=[folder.name])
    )


def _up_to(total: int, there: set[int]) -> list[int]:
    """The first few numbers up to `total` that are not there."""
    last = min(total, len(there) + 20)
    return [number for number in range(1, last + 1) if number not in there]


def _unproven(files: list[tuple[int, int, int, str]]) -> Finding:
    ranks = max(rank for _, rank, _, _ in files)
    return Finding(
        "end-unproven",
        f"the files of {ranks} ranks tile every tensor; that there was no rank after them is "
        "written nowhere: compare shapes with --like or --model",
    )


def _absent(
    files: list[tuple[int, int, int, str]], parts: list[Document]
) -> dict[str, tuple[int, int]]:
    """By the name of a tensor: a file beside its own that some rank does not have, if there is one.

    That need not be wrong: a rank that has nothing of any tensor in it writes none.
    """
    ranks = {rank for _, rank, _, _ in files}
    there = {(number, rank) for number, rank, _, _ in files}
    lacking = {number: [r for r in ranks if (number, r) not in there] for number, _ in there}
    return {
        key: (max(lacking[number]), number)
        for (number, *_), part in zip(files, parts, strict=True)
        for key in part.root
        if lacking[number]
    }


def _may_go_on(shape: tuple[int, ...], pieces: list[Piece], least: int) -> bool:
    """Whether a rank may have had a further piece: the last one is as long as the first.

    An empty piece at the end says that there was none. Fewer than `least` pieces say nothing.
    """
    for d, whole in enumerate(shape):
        lengths = {piece.offset[d]: piece.tensor.shape[d] for piece in pieces}
        if (
            len(lengths) >= least
            and whole not in lengths
            and lengths[max(lengths)] == lengths.get(0)
        ):
            return True
    return False


def _joined(
    parts: list[Document],
    absent: dict[str, tuple[int, int]],
    folder: Place,
    reading: Reading,
) -> OrderedMap:
    """Every tensor of the files, whole."""
    from ckptfix.pieces.joining import Joiner

    joiner, root = Joiner(), OrderedMap()
    for key, pieces in _pieces(parts).items():
        dimensions = zip(*(map(int.__add__, *piece.box) for piece in pieces), strict=True)
        shape = tuple(map(max, dimensions))
        try:
            if any(reading.has_lost(piece.tensor.storage) for piece in pieces):
                raise DamagedError("the bytes of one of its pieces are lost")
            least = 1 if reading.salvages else 2  # one may be all that every rank has
            if key in absent and _may_go_on(shape, pieces, least):
                rank, number = absent[key]
                raise DamagedError(
                    f"its last piece is as long as the first, and shard-{rank:05d}-model-"
                    f"{number:05d}-of-… is not there",
                    code="piece-missing",
                )
            root[key] = joiner.join(key, pieces[0].tensor.dtype, shape, pieces)
        except DamagedError as error:
            error.suggest(_see(folder))
            reading.lack(key, error.within(repr(key)).within(folder))
        except CkptfixError as error:
            raise error.within(repr(key)).within(folder) from None
    return root


def _pieces(parts: list[Document]) -> dict[str, list[Piece]]:
    """The pieces of each tensor, by its name."""
    from ckptfix.pieces.joining import Piece

    found: dict[str, list[Piece]] = {}
    for part in parts:
        offsets = _offsets(part)
        for key, tensor in part.root.items():
            offset = offsets.get(key, (0,) * len(tensor.shape))
            if len(offset) != len(tensor.shape):
                what = f"puts {key!r} of {list(tensor.shape)} at {list(offset)}"
                raise UnsafeError(what, where=part.name)
            pieces = found.setdefault(key, [])
            if pieces and len(pieces[0].offset) != len(offset):
                raise UnsafeError(f"has a piece of {key!r} of another rank", where=part.name)
            pieces.append(Piece(offset, tensor))
    return found


def _offsets(part: Document) -> dict[str, tuple[int, ...]]:
    """Where each piece in a file begins in its whole."""
    try:
        told: Any = json.loads(part.metadata[_INFO])
        found = {key: tuple(entry["saved_offsets"]) for key, entry in told.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"its {_INFO} is not what DCP writes", where=part.name) from None
    for key, offset in found.items():
        if not all(type(at) is int and 0 <= at < 1 << 63 for at in offset):
            raise UnsafeError(f"puts {key!r} at {list(offset)}", where=part.name)
    return found
