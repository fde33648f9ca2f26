"""A DCP folder, as `torch.distributed.checkpoint` writes one: the pieces of every rank.

    .metadata        what each item is and where its bytes lie (see `dcp_metadata`); written last
    __0.metadata …   in its place, one a rank, where ranks save without telling each other
    __0_0.distcp     items of rank 0, complete torch zips back to back, of which `.metadata` alone
    __1_0.distcp …   says where each begins; __0_1.distcp is a further file of rank 0

An item is a piece of a tensor, or any other value as `torch.save` writes it. Which rank's file
holds it means nothing. A piece is found by the name and the offset of its chunk; pieces may be
empty, and tile their tensor. A rank with nothing to save leaves an empty file.

Values are put where `planner_data` says, in its order. What DCP loses is not to be had again: empty
dicts, numbers as keys (they are text), and that two names were one tensor. Files that an earlier
save left behind are named by no `.metadata`; they are told, and never read.

Lightning and Fabric keep the rest of a checkpoint in `meta.pt` beside it, Megatron in `common.pt`;
what is there is put beside what the pieces hold.

Sources: `torch.distributed.checkpoint` of 1.13 to 2.13 (`filesystem`, `default_planner`,
`_nested_dict`), Lightning's `strategies/fsdp.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.descriptors import allow
from ckptfix.errors import (
    CkptfixError,
    DamagedError,
    ReadError,
    UnsafeError,
    UnsupportedError,
)
from ckptfix.findings import Finding
from ckptfix.formats import table
from ckptfix.formats.reading import Reading
from ckptfix.hints import Hint, command, shell
from ckptfix.layouts import dcp_metadata, in_pieces, shards
from ckptfix.layouts.dcp_items import Items
from ckptfix.pieces import replicas
from ckptfix.pieces.joining import Joiner, Piece
from ckptfix.tree import compare
from ckptfix.tree.document import Document, Node, Tensor
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptfix.bytes.place import Place
    from ckptfix.bytes.source import FileSource
    from ckptfix.layouts.dcp_metadata import Item, Metadata, Path, Whole

NAME = in_pieces.DCP

SUFFIX = ".distcp"
METADATA = ".metadata"

_OF_RANK = re.compile(r"__(\d+)\.metadata")
_PIECES = re.compile(r"__\d+_\d+\.distcp")
_BESIDE = ("meta.pt", "common.pt")
"""Files in which trainers keep what is not in pieces."""
_ZSTD = ("stream.zstd/1",)
"""The only extension that torch has (`_extension.ZStandard`)."""
_HOLES = 1000
"""Places in lists that no item is at; torch leaves them where an empty dict was."""


# --- finding it


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder of DCP's; None for other folders. Raises `ReadError` and its kin."""
    names = folder.names()
    if heads(names) and not reading.salvages:
        _check_alone(folder)
    return _of_names(folder, names, reading)


def of_piece(place: Place, reading: Reading) -> Document | None:
    """The document of which the file at `place` holds pieces; None where there is no such file."""
    return _of_names(place.folder, place.folder.names(), reading) if place.is_file else None


def of_file(document: Document, place: Place, reading: Reading) -> Document | None:
    """The document of which `place` is the `.metadata`; None for others."""
    if not dcp_metadata.is_metadata(document.root) or not heads([place.base]):
        return None
    return of_piece(place, reading)


def _of_names(folder: Place, names: list[str], reading: Reading) -> Document | None:
    """The document in a folder that holds files of these names."""
    found = heads(names)
    if found:
        document = read(folder, found, names, reading)
        rest = [table.read_place(folder.below(name), reading) for name in _BESIDE if name in names]
        return together([*(one for one in rest if isinstance(one.root, dict)), document], folder)
    if any(name.endswith(SUFFIX) for name in names):
        raise _unfinished(folder, names)
    return None


def _check_alone(folder: Place) -> None:
    """Refuse a folder that could be meant for another checkpoint in it as well."""
    other = shards.locate(folder)
    if other is not None:
        raise ReadError(
            f"holds two checkpoints: in pieces, of which {METADATA} tells, and {other.base}",
            where=folder,
            hint=Hint("give one of them", command("inspect", other.name)),
            code="several-checkpoints",
        )


def heads(names: Iterable[str]) -> list[str]:
    """The files that say what is where: one, or one of each rank."""
    names = list(names)
    ranks = {int(found[1]): name for name in names if (found := _OF_RANK.fullmatch(name))}
    return [METADATA] if METADATA in names else [ranks[rank] for rank in sorted(ranks)]


def files(names: Iterable[str]) -> set[str]:
    """Those of some names that DCP gives to files, and what is read beside them."""
    names = set(names)
    told = {name for name in names if name == METADATA or _OF_RANK.fullmatch(name)}
    pieces = {name for name in names if _PIECES.fullmatch(name)}
    return told | pieces | (names.intersection(_BESIDE) if told else set())


def _unfinished(folder: Place, names: list[str]) -> DamagedError:
    count = plural(sum(name.endswith(SUFFIX) for name in names), f"{SUFFIX} file")
    return DamagedError(
        f"holds {count}, but no {METADATA}, which is written last: the save did not finish, or "
        "not all of it was copied",
        where=folder,
        hint=Hint(
            f"copy {METADATA} too (its name begins with a dot), or take an earlier checkpoint; "
            "see what is there",
            shell("ls", "-A", files=[folder.name]),
        ),
        code="no-metadata",
    )


def together(parts: list[Document], folder: Place) -> Document:
    """One document of several, none of which has a key of another."""
    if len(parts) == 1:
        return replace(parts[0], name=folder.name)
    root: dict[Node, Node] = {}
    for part in parts:
        twice = [key for key in part.root if key in root]
        if twice:
            what = f"{listed(map(str, twice))} is in the pieces and beside them"
            raise UnsafeError(what, where=folder)
        root |= part.root
    if len({part.byteorder for part in parts}) > 1:
        raise UnsupportedError("its files differ in byte order", where=folder)
    return replace(
        parts[-1],
        root=root,
        name=folder.name,
        nbytes=sum(part.nbytes for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


# --- reading it


def read(folder: Place, told_by: list[str], names: list[str], reading: Reading) -> Document:
    """The document of which some files say what is where."""
    sources = [folder.below(name).open() for name in told_by]
    nbytes = sum(source.size for source in sources)
    told = [dcp_metadata.read(source, reading.limits) for source in sources]
    try:
        metadata = dcp_metadata.merged(told)
    except UnsafeError as error:
        raise error.within(folder) from None
    return _Folder(folder, metadata, names, reading).document(nbytes)


def leaves(folder: Place, told_by: Place) -> dict[Path, Node]:
    """Every value of a folder by its path, as one file says what is where."""
    metadata = dcp_metadata.read(told_by.open())
    return dict(_Folder(folder, metadata, [], Reading()).leaves())


class _Folder:
    """One reading of a folder."""

    def __init__(
        self, folder: Place, metadata: Metadata, names: list[str], reading: Reading
    ) -> None:
        self.folder, self.metadata, self.names, self.reading = folder, metadata, names, reading
        self.files = self._open()
        self.items = Items(reading)
        self.joiner = Joiner()

    def document(self, nbytes: int) -> Document:
        """The document, of which the files that say what is where have `nbytes`."""
        leaves = dict(self.leaves())
        if len(self.items.orders) > 1:
            raise UnsupportedError("its items differ in byte order", where=self.folder)
        return Document(
            nested(leaves, self.folder),
            NAME,
            self.folder.name,
            nbytes + sum(source.size for source in self.files.values()),
            "big" if "big" in self.items.orders else "little",
            notes=(*self.metadata.notes, *self.items.notes, *self._stale()),
        )

    def _open(self) -> dict[str, FileSource]:
        """The files that hold items. Slices of them that overlap are refused."""
        by_file: dict[str, list[tuple[int, int]]] = {}
        for item in self._all_items():
            by_file.setdefault(item.file, []).append((item.offset, item.length))
        absent = [name for name in by_file if not self.folder.below(name).is_file]
        if absent:
            self.reading.skip("files of pieces are not there", self._absent(absent, by_file))
        for name, slices in by_file.items():
            slices.sort()
            for (begin, length), (following, _) in pairwise(slices):
                if begin + length > following:
                    what = f"two items overlap at byte {following}"
                    raise UnsafeError(what, where=self.folder.below(name), code="pieces-overlap")
        allow(len(by_file))
        return {name: self.folder.below(name).open() for name in by_file if name not in absent}

    def _all_items(self) -> Iterable[Item]:
        yield from self.metadata.items.values()
        for copies in self.metadata.copies.values():
            yield from copies

    def _absent(self, absent: list[str], wanted: Mapping[str, object]) -> DamagedError:
        return DamagedError(
            f"{len(absent)} of {len(wanted)} files of pieces are not there: {listed(absent)}",
            where=self.folder,
            hint=Hint(
                "copy or download them too; see what is there",
                shell("ls", files=[self.folder.name]),
            ),
            code="piece-missing",
        )

    def _stale(self) -> Iterable[Finding]:
        """A note on files of pieces that are of another save."""
        used = {item.file for item in self._all_items()}
        others = [name for name in self.names if name.endswith(SUFFIX) and name not in used]
        found = [name for name in others if self.folder.below(name).open().size]
        if found:
            message = f"{listed(found)}: left by another save, not named in {METADATA}; not read"
            yield Finding("surplus-shard", message)

    # --- items

    def leaves(self) -> Iterable[tuple[Path, Node]]:
        """Every value by its path, in order. What is lost is told to the reading."""
        wholes, paths = self.metadata.wholes, self.metadata.paths
        order = [*paths, *(name for name in wholes if name not in paths)]
        seen: set[Path] = set()
        for name in order:
            path: Path = paths.get(name, (name,))
            if path in seen:
                raise UnsafeError(f"two items stand at {_spelled(path)}", where=self.folder)
            seen.add(path)
            try:
                yield path, self._value(name, wholes[name])
            except DamagedError as error:
                if error.code == "piece-missing" and error.hint and error.hint.command is None:
                    see = shell("ls", "-A", files=[self.folder.name])
                    error.suggest(Hint(f"{error.hint.text}; see what is there", see))
                self.reading.lack(_spelled(path), error)

    def _value(self, name: str, whole: Whole | None) -> Node:
        try:
            if whole is None:
                return self._agreed(name, self._read(self._item(name, None)), None)
            pieces = [Piece(box.offset, self._piece(name, box.offset)) for box in whole.boxes]
            for piece, box in zip(pieces, whole.boxes, strict=True):
                if piece.tensor.shape != box.size:
                    found = list(piece.tensor.shape)
                    raise UnsafeError(f"the piece {box} has the shape {found}")
            return self.joiner.join(name, whole.dtype, whole.shape, pieces)
        except CkptfixError as error:
            raise error.within(repr(name)).within(self.folder) from None

    def _item(self, name: str, offset: tuple[int, ...] | None) -> Item:
        item = self.metadata.items.get((name, offset))
        if item is None:
            at = "" if offset is None else f" of the piece at {list(offset)}"
            raise DamagedError(f"nothing says where the bytes{at} lie", code="piece-missing")
        if item.file not in self.files:
            raise DamagedError(f"{item.file} is not there", code="piece-missing")
        return item

    def _piece(self, name: str, offset: tuple[int, ...]) -> Tensor:
        found = self._read(self._item(name, offset))
        if not isinstance(found, Tensor):
            raise UnsafeError(f"the piece at {list(offset)} is not a tensor")
        if self.reading.has_lost(found.storage):
            raise DamagedError(f"the bytes of the piece at {list(offset)} are lost")
        found.storage.key = name
        self._agreed(name, found, offset)
        return found

    def _agreed(self, name: str, found: Node, offset: tuple[int, ...] | None) -> Node:
        """What was found, once it is sure that every rank that saved it saved the same."""
        for item in self.metadata.copies.get((name, offset), ()):
            other = self._read(item) if item.file in self.files else found
            if isinstance(found, Tensor) and isinstance(other, Tensor):
                agree = replicas.equal(found, other)
            else:
                agree = compare.difference(found, other) is None
            if not agree:
                raise UnsafeError(
                    f"the ranks saved different values ({item.file} has another one)",
                    hint="load it in the program that saved it, and keep one of them",
                    code="ranks-differ",
                )
        return found

    def _read(self, item: Item) -> Node:
        """What an item holds; its bytes are those of its file."""
        source = self.files[item.file]
        if item.offset + item.length > source.size:
            raise DamagedError(
                f"its bytes end at {item.offset + item.length}, {item.file} at {source.size}",
                hint=f"{item.file} is cut short: copy or download it again",
                code="piece-missing",
            )
        if item.transforms == _ZSTD:
            return self.items.unpacked(source, item.offset, item.length, item.file)
        if item.transforms:
            how = " and ".join(item.transforms)
            raise UnsupportedError(
                f"its bytes are packed ({how})",
                hint="load it with the program that saved it, and save it without that extension",
            )
        return self.items.read(source, item.offset, item.length, item.file)


# --- the tree


def _spelled(path: Path) -> str:
    return "/".join(map(str, path))


def nested(leaves: Mapping[Path, Node], where: object) -> dict[str, Node]:
    """The tree that values stand in by their paths: text is a key, a number a place in a list."""
    root: dict[Any, Node] = {}
    rows: list[tuple[dict[Any, Node], str | int, dict[Any, Node]]] = []
    is_row = {id(root): False}  # of the containers that are made here
    for path, leaf in leaves.items():
        at, last = root, path[-1]
        for step, following in pairwise(path):
            wanted = type(following) is int
            if step not in at:
                at[step] = {}
                is_row[id(at[step])] = wanted
                if wanted:
                    rows.append((at, step, at[step]))
            at = at[step]
            if is_row.get(id(at)) is not wanted:
                raise _misplaced(path, where)
        if last in at or type(path[0]) is int or is_row[id(at)] is not (type(last) is int):
            raise _misplaced(path, where)
        at[last] = leaf
    _fill(rows, where)
    return root


def _misplaced(path: Path, where: object) -> UnsafeError:
    return UnsafeError(f"{_spelled(path)} stands where something else does", where=where)


def _fill(rows: list[tuple[dict[Any, Node], str | int, dict[Any, Node]]], where: object) -> None:
    """Put lists in the place of what is known of each, from the innermost on."""
    holes = 0
    for parent, key, row in reversed(rows):
        holes += max(row) + 1 - len(row)
        if holes > _HOLES or min(row) < 0:
            raise UnsafeError("has a list with too many places that nothing is at", where=where)
        parent[key] = [row.get(place) for place in range(max(row) + 1)]
