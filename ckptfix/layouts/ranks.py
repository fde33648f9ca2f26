"""Files of ranks, found and joined; `rank_files` describes them, and says which files they are."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.descriptors import allow
from ckptfix.bytes.place import Place
from ckptfix.contents.tensors import as_tensor
from ckptfix.errors import CkptfixError, DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats import table
from ckptfix.hints import Hint, shell
from ckptfix.layouts import in_pieces
from ckptfix.layouts.distributed_tensors import Decoder, Part
from ckptfix.layouts.in_pieces import kind, piece_in
from ckptfix.pieces import boxes, replicas
from ckptfix.pieces.joining import Joiner, Piece
from ckptfix.tree import compare
from ckptfix.tree.document import Inert, Node, OrderedMap, Storage, Tensor
from ckptfix.tree.dtypes import UNTYPED
from ckptfix.tree.walk import walk
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptfix.formats.reading import Reading
    from ckptfix.pieces.boxes import Box
    from ckptfix.tree.document import Document

NAME = in_pieces.RANKS

_RANK = re.compile(r"(?P<head>.*rank[_-]?)(?P<rank>\d+)(?P<tail>\D*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?P<head>.*?)(?P<rank>\d+)(?P<tail>\.[^.\d]+)")
_FLAT = "flat_param"
_OPTIMIZER = "optim"
_LONGEST = 1000
"""Characters of a path; what lies deeper goes by the path of what holds it."""
_EXTENSIONS = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")


class Family(NamedTuple):
    """Names that differ in the rank only."""

    head: str
    tail: str


# --- finding them


def joined(document: Document, piece: Inert, place: Place, reading: Reading) -> Document:
    """The document of which the one at `place`, with a piece in it, is that of one rank."""
    found, said = _parsed(place.base), None
    try:
        said = Decoder(None, document.byteorder).rank_in(piece)
    except ReadError as error:
        reading.skip(f"{place.base} does not say its rank", error.within(place.name))
    if found is None or (said not in (None, found[1]) and not _RANK.fullmatch(place.base)):
        return _Ranks(place.name, {said: document}, reading).document()
    family, rank = found
    names = _of_family(family, place.folder.names())
    allow(len(names))
    documents: dict[int | None, Document] = {}
    for other, name in sorted(names.items()):
        try:
            here = place.folder.below(name)
            documents[other] = document if other == rank else _read(here, reading)
        except ReadError as error:
            reading.skip(f"{name} cannot be read", error)
    return _Ranks(place.name, documents, reading).document()


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder of such files; None for other folders.

    Raises `ReadError` where there are files of several checkpoints.
    """
    families: dict[Family, list[str]] = {}
    for name in folder.names():
        found = _RANK.fullmatch(name)
        if found and name.lower().endswith(_EXTENSIONS):
            families.setdefault(Family(found["head"], found["tail"]), []).append(name)
    most = max(map(len, families.values()), default=0)
    meant = [family for family, names in families.items() if len(names) == most]
    if len(meant) > 1:
        meant = [family for family in meant if "model" in family.head.lower()]
    if len(meant) != 1:
        return None
    for name in sorted(families[meant[0]]):
        place = folder.below(name)
        try:
            document = _read(place, reading)
        except ReadError:
            if not reading.salvages:
                raise
            continue
        piece = piece_in(document.root)
        if piece is not None:
            return replace(joined(document, piece, place, reading), name=folder.name)
        return None
    return None


def _parsed(name: str) -> tuple[Family, int] | None:
    """What a name has besides its rank, and the rank; None where there is no number."""
    found = _RANK.fullmatch(name) or _NUMBER.fullmatch(name)
    return None if found is None else (Family(found["head"], found["tail"]), int(found["rank"]))


def _of_family(family: Family, names: Iterable[str]) -> dict[int, str]:
    """The names of a family by their ranks."""
    found: dict[int, str] = {}
    for name in names:
        parsed = _parsed(name)
        if parsed is not None and parsed[0] == family:
            other = found.setdefault(parsed[1], name)
            if other != name:
                raise UnsafeError(f"{other} and {name} are of one rank", where=name)
    return found


def _read(place: Place, reading: Reading) -> Document:

    return table.read_place(place, reading)


# --- joining them


class _Vector(NamedTuple):
    """A flat parameter."""

    path: str
    nodes: dict[int | None, Node]
    """What each rank has of it."""
    pieces: set[tuple[int, int]]
    """Where the pieces that are there begin and end; and the end of the vector, and its begin."""

    def tears(self, begin: int, end: int) -> bool:
        """Whether a piece that is not there may go on where a stretch of the vector begins or ends.

        What is next to a stretch is there where as many pieces begin as end.
        """
        return any(
            at in {one for one, _ in self.pieces} ^ {other for _, other in self.pieces}
            for at in (begin, end)
        )


class _Flat(NamedTuple):
    """The part of a flat parameter that a storage of one rank holds: where in it that begins."""

    vector: _Vector
    begin: int


class _Ranks:
    """The files of some ranks, being joined."""

    def __init__(self, name: str, documents: dict[int | None, Document], reading: Reading) -> None:

        self.name, self.documents, self.reading = name, documents, reading
        self.decoders: dict[int | None, Decoder] = {
            rank: Decoder(rank, document.byteorder) for rank, document in documents.items()
        }
        self.joiner = Joiner()
        self.ranks = 0
        self.flat = dict(self._flat())
        self.vectors: dict[str, Tensor] = {}
        self.done: dict[tuple[int, ...], Node] = {}
        self.differing: list[str] = []
        self.parts: list[str] = []
        """Where an optimizer keeps what is as flat as its parameters: each rank has a part."""

    def document(self) -> Document:
        """The document that they are together. Raises `ReadError` and its kin."""
        for rank, one in self.documents.items():
            self._check_rank(rank, one.archive)
        first, *others = self.documents.values()
        if any(other.byteorder != first.byteorder for other in others):
            raise UnsupportedError(
                "its files differ in byte order",
                where=self.name,
                hint="take the files of one save only",
            )
        root = self._merged({rank: one.root for rank, one in self.documents.items()})
        if piece_in(root) is not None:  # what is taken as it is was not looked into
            raise self._inside()
        notes = dict.fromkeys(note for one in self.documents.values() for note in one.notes)
        if self.differing:
            paths = ", ".join(self.differing)
            message = f"differs among the ranks; that of the lowest is kept: {paths}"
            notes[Finding("ranks-differ", message)] = None
        if self.parts:
            message = "each rank has a part of what is kept of flat parameters, which is left out: "
            notes[Finding("ranks-differ", message + listed(self.parts))] = None
        return replace(
            first,
            root=root,
            container=NAME,
            name=self.name,
            nbytes=sum(one.nbytes for one in self.documents.values()),
            notes=tuple(notes),
            extras={},
        )

    def _check_rank(self, rank: int | None, archive: str) -> None:
        """Refuse a file whose name has another rank than the one that torch saved it under."""
        found = _RANK.fullmatch(archive)
        if rank is not None and found is not None and int(found["rank"]) != rank:
            raise UnsafeError(
                f"the file of rank {rank} was saved as {archive}",
                where=self.name,
                hint="give each file the name that it was saved under",
            )

    def _merged(self, roots: dict[int | None, Node]) -> Node:
        """One tree of all, whose containers are new."""
        box: list[Node] = []
        pending = [(box.append, "", roots)]
        while pending:
            put, path, nodes = pending.pop()
            key = tuple(id(node) for node in nodes.values())
            if key in self.done:
                put(self.done[key])
                continue
            made = self._one(path, nodes)
            self.done[key] = made
            put(made)
            first = next(iter(nodes.values()))
            if made is first:
                continue
            short = path if len(path) < _LONGEST else path[:_LONGEST]
            pending += reversed(list(self._below(short, nodes, made)))
        return box[0]

    def _below(self, path: str, nodes: dict[int | None, Node], made: Node) -> Iterator[Node]:
        """What is to be put into a container that was made, piece by piece."""
        if isinstance(made, dict):
            keys = dict.fromkeys(key for node in nodes.values() for key in node)
            for key in keys:
                made[key] = None  # in order; what is below is put there later
                at = {rank: node[key] for rank, node in nodes.items() if key in node}
                yield (lambda value, key=key: made.__setitem__(key, value)), f"{path}/{key}", at
        elif isinstance(made, list):
            for place in range(len(made)):
                at = {rank: node[place] for rank, node in nodes.items()}
                yield (
                    (lambda value, place=place: made.__setitem__(place, value)),
                    f"{path}/{place}",
                    at,
                )

    def _one(self, path: str, nodes: dict[int | None, Node]) -> Node:
        """What several nodes are together: a container yet to be filled, a tensor, a value."""
        first = next(iter(nodes.values()))
        if any(kind(node) is not None for node in nodes.values()):
            known = self.vectors.get(path.removeprefix("/"))
            return self._joined(path, nodes) if known is None else known
        if all(isinstance(node, dict) for node in nodes.values()):
            if isinstance(first, OrderedMap):
                return OrderedMap((), first.attributes)
            return {}
        if all(isinstance(node, list) and len(node) == len(first) for node in nodes.values()):
            return [None] * len(first)
        whole = {rank: node for rank, node in nodes.items() if not self._has_lost(node)}
        nodes = whole or nodes
        first = next(iter(nodes.values()))
        flat = self._from_flat(path, nodes) if self.flat else None
        if flat is not None:
            return flat
        if self._is_part(path, nodes):
            self.parts.append(path.removeprefix("/"))
            return None
        self._check_equal(path, nodes)
        return first

    def _flat(self) -> Iterator[tuple[int, _Flat]]:
        """By storage of a rank, the flat parameter of FSDP1 whose part it holds."""
        vectors: dict[tuple[str, ...], _Vector] = {}
        for rank, document in self.documents.items():
            for path, node in walk(document.root, tensors=False):
                if path and path[-1].endswith(_FLAT) and kind(node) == "ShardedTensor":
                    part = self._part(rank, node)
                    if part is None or len(part.shape) != 1:
                        continue
                    vector = vectors.setdefault(path, _Vector("/".join(path), {}, set()))
                    vector.nodes[rank] = node
                    vector.pieces.add((part.shape[0], 0))
                    for (begin, *_), tensor in part.pieces:
                        if not self.reading.has_lost(tensor.storage):
                            vector.pieces.add((begin, begin + tensor.numel))
                        yield id(tensor.storage), _Flat(vector, begin - tensor.offset)

    def _from_flat(self, path: str, nodes: dict[int | None, Node]) -> Tensor | None:
        """The parameter of which each rank has the part that lies in its flat parameter.

        It is a part of the whole vector then. Its shape is in no file, so it has one dimension.
        None for other tensors.
        """
        parts: list[tuple[int, Tensor]] = []
        flat: _Flat | None = None
        for node in nodes.values():
            if type(node) is not Tensor or len(node.shape) != 1:
                return None
            if node.numel:
                flat = self.flat.get(id(node.storage))
                if flat is None:
                    return None
                parts.append((flat.begin + node.offset, node))
        if flat is None:
            return self._not_seen(path) if len(nodes) < self.ranks else None
        whole = self._vector(flat.vector)
        parts = list({at: (at, tensor) for at, tensor in parts}.values())  # of replicas, one
        begin = min(at for at, _ in parts)
        numel = sum(tensor.numel for _, tensor in parts)
        pieces = [Piece((at - begin,), tensor) for at, tensor in parts]
        if not self.reading.has_lost(whole.storage):
            try:
                boxes.check((numel,), [piece.box for piece in pieces])
            except CkptfixError as error:
                raise error.within(path.removeprefix("/")).within(self.name) from None
            return Tensor(whole.storage, whole.dtype, (numel,), (1,), whole.offset + begin)
        lost = any(self.reading.has_lost(tensor.storage) for _, tensor in parts)
        lost = lost or max(at + tensor.numel for at, tensor in parts) != begin + numel
        if lost or flat.vector.tears(begin, begin + numel):
            return self._not_seen(path)
        return self.joiner.join(path.removeprefix("/"), parts[0][1].dtype, (numel,), pieces)

    def _not_seen(self, path: str) -> Tensor:
        """A parameter that may have elements on ranks whose files are not there."""
        what = "nothing says that it has no elements on other ranks"
        return self._lost(self._with_absent(DamagedError(what, code="piece-missing"), path))

    def _vector(self, vector: _Vector) -> Tensor:
        """A flat parameter, whole."""
        if vector.path not in self.vectors:
            self.vectors[vector.path] = self._joined(vector.path, vector.nodes)
        return self.vectors[vector.path]

    def _joined(self, path: str, nodes: dict[int | None, Node]) -> Tensor:
        """The tensor of which each rank has a part."""
        try:
            return self._tensor(path.removeprefix("/"), nodes)
        except DamagedError as error:
            return self._lost(self._with_absent(error, path))
        except ReadError as error:
            return self._lost(error.within(path.removeprefix("/")).within(self.name))

    def _lost(self, error: ReadError) -> Tensor:
        """A tensor that cannot be had."""
        lost = Storage(UNTYPED, 0, "cpu")
        self.reading.lose(lost, error)
        return Tensor(lost, UNTYPED, (0,), (1,))

    def _tensor(self, path: str, nodes: dict[int | None, Node]) -> Tensor:

        found: dict[Box, tuple[int | None, Piece]] = {}
        described = set()
        for rank, node in nodes.items():
            if kind(node) is None:
                raise UnsupportedError(
                    f"is in pieces, but not in the file of rank {rank}",
                    hint="take the files of one save only",
                )
            part = self._part(rank, node)
            if part is None:
                continue
            described.add((part.dtype, part.shape))
            for piece in part.pieces:
                if self.reading.has_lost(piece.tensor.storage):
                    continue
                other, known = found.setdefault(piece.box, (rank, piece))
                if known is not piece and not replicas.equal(known.tensor, piece.tensor):
                    raise UnsafeError(
                        f"the ranks {other} and {rank} have different values for the piece "
                        f"{piece.box}",
                        hint="take the files of one save only",
                        code="ranks-differ",
                    )
        if len(described) > 1:
            shapes = ", ".join(f"{list(shape)} of {dtype}" for dtype, shape in sorted(described))
            raise UnsafeError(
                f"is not the same tensor in every file: {shapes}",
                hint="take the files of one save only",
            )
        if not described:
            raise DamagedError("what its pieces are cannot be read")
        ((dtype, shape),) = described
        return self.joiner.join(path, dtype, shape, [piece for _, piece in found.values()])

    def _part(self, rank: int | None, node: Inert) -> Part | None:
        """What a rank has of a tensor; None where its file is damaged, and that may be."""
        try:
            part = self.decoders[rank].part(node)
        except DamagedError:
            if self.reading.salvages:
                return None
            raise
        self.ranks = max(self.ranks, part.ranks)
        return part

    def _with_absent(self, error: ReadError, path: str) -> ReadError:
        """The error for a tensor that is not whole, with the ranks whose files are not there."""
        absent = [str(rank) for rank in range(self.ranks) if rank not in self.documents]
        whole = error.within(path.removeprefix("/")).within(self.name)
        if not absent or error.code != "piece-missing":
            return whole
        folder = Place(self.name).folder.name
        return DamagedError(
            f"{whole.what}; the files of {len(absent)} of {self.ranks} ranks are not there: "
            f"{listed(absent)}",
            where=whole.where,
            hint=Hint("copy or download them too; see what is there", shell("ls", files=[folder])),
            code="piece-missing",
        )

    def _is_part(self, path: str, nodes: dict[int | None, Node]) -> bool:
        """Whether ranks have parts of what an optimizer keeps of a flat parameter."""
        first = next(iter(nodes.values()))
        if not self.flat or _OPTIMIZER not in path.lower() or type(first) is not Tensor:
            return False
        return not all(_equal(first, node) for node in nodes.values())

    def _has_lost(self, node: Node) -> bool:
        """Whether a value is a tensor whose bytes are lost."""
        return type(node) is Tensor and self.reading.has_lost(node.storage)

    def _inside(self) -> UnsupportedError:
        return UnsupportedError(
            "holds tensors in pieces inside of tuples or objects",
            where=self.name,
            hint="save its state dict instead",
        )

    def _check_equal(self, path: str, nodes: dict[int | None, Node]) -> None:
        """Refuse values that differ among the ranks, but for states of random number generators."""
        (rank, first), *others = nodes.items()
        for other, node in others:
            if node is first or _equal(first, node):
                continue
            if "rng" in path.lower():
                self.differing.append(path.removeprefix("/"))
                return
            if piece_in(first) is not None:
                raise self._inside()
            raise UnsafeError(
                f"{path.removeprefix('/')} differs in the files of ranks {rank} and {other}",
                where=self.name,
                hint="take the files of one save only",
                code="ranks-differ",
            )


def _equal(one: Node, other: Node) -> bool:
    """Whether two values are the same, tensors to the bit."""
    tensor, beside = as_tensor(one), as_tensor(other)
    if tensor is not None and beside is not None:
        return replicas.equal(tensor, beside)
    return compare.difference(one, other) is None
