"""A checkpoint in several files, as the libraries of Hugging Face write it.

    model-00001-of-00002.safetensors   the tensors that the index puts there, and no others
    model-00002-of-00002.safetensors   …
    model.safetensors.index.json       the index (see `formats.shard_index`)

Beside `pytorch_model.bin.index.json` the shards are torch's own containers. `total_size` counts the
bytes of tensors; text beside it says what a safetensors file would say in `__metadata__`: the
names of tied tensors that were dropped, for the name that is kept. Dropped names stand neither in
`weight_map` nor as tensors in a shard, and no tie goes from one shard to another, because loaders
take each key from the shard that the map names. A checkpoint that fits into one shard is
`model.safetensors` and has no index. diffusers calls its files `diffusion_pytorch_model`, PEFT
`adapter_model`, with the same endings. Source: huggingface_hub's `serialization/_torch.py` and
`_base.py` (0.30).

This module reads; `shard_writer` writes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.bytes.place import Place
from ckptfix.contents.tensors import as_tensor
from ckptfix.errors import DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats import safetensors, shard_index, table
from ckptfix.formats.reading import Reading, Salvage
from ckptfix.formats.table import EXTENSIONS, split_extension
from ckptfix.hints import Hint, command, shell
from ckptfix.layouts import companions
from ckptfix.tree.document import Document, Node, OrderedMap, Tensor, kind
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from ckptfix.hints import Command

NAME = "sharded"
"""What the containers of such documents begin with."""

WHOLE = "model.safetensors"
"""The file of a checkpoint that fits into one."""
TOTAL_SIZE = "total_size"

_OTHER_INDEXES = (".h5.index.json", ".msgpack.index.json")  # of TensorFlow and Flax
_OTHER_MODEL = re.compile(r"(model_\d+\.safetensors|pytorch_model_\d+\.bin)(\.index\.json)?")
STEM = "model"
_OF_OTHERS = ("diffusion_pytorch_model", "adapter_model")  # diffusers, PEFT
_MODELS = {
    STEM: (WHOLE, "pytorch_model.bin"),
    **{stem: (f"{stem}.safetensors", f"{stem}.bin") for stem in _OF_OTHERS},
}
"""The files that hold a whole model, by the stem of its shards."""
_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-\d+(?P<extension>\.\w+)")


class Index(NamedTuple):
    """What an index says. `name` is what messages call it, `shards` are in order."""

    folder: Place
    name: str
    size: int
    metadata: Mapping[str, str]
    weight_map: Mapping[str, str]
    shards: tuple[str, ...]


# --- finding the index


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder with an index, or with a whole `model.safetensors`; None for others.

    Raises `ReadError` and its kin where there are several indexes, and as `of_file`.
    """
    if isinstance(reading, Salvage):
        weight_map = _weight_map(folder, reading)
        names = dict.fromkeys(weight_map.values()) or _of_one_model(folder)
        return _salvaged(folder, weight_map, names, reading)
    place = locate(folder)
    if place is None:
        return None
    _check_one_model(folder, place)
    document = table.read_place(place, reading)
    found = of_file(document, place, reading)
    whole = document if found is None else replace(found, name=folder.name)
    twins = [note for name in _twins(folder, place) if (note := _twin(whole, folder, place, name))]
    notes = (*whole.notes, *twins)
    return replace(whole, notes=(*notes, *_unread(whole, folder, notes)))


def _unread(document: Document, folder: Place, notes: Sequence[Finding]) -> Iterator[Finding]:
    """A note on the other checkpoints of a folder, of which nothing was said yet."""
    said = " ".join(note.message for note in notes)
    names = [
        one.base
        for one in companions.of(document, folder).others
        if split_extension(one.base)[1].lower() in EXTENSIONS and one.base not in said
    ]
    if names:
        yield Finding("files-beside", f"not read, though it lies beside: {listed(names)}")


def of_file(document: Document, place: Place, reading: Reading) -> Document | None:
    """The document of which `place` is the index, in the order of the weight map; None for others.

    Raises `ReadError` and its kin where the folder does not hold exactly what the index says.
    """
    if document.container != shard_index.NAME:
        return None
    if isinstance(reading, Salvage):
        weight_map = document.root["weight_map"]
        return _salvaged(place.folder, weight_map, dict.fromkeys(weight_map.values()), reading)
    return read(index_of(document, place.folder), reading)


def index_of(document: Document, folder: Place) -> Index:
    """What the document of an index says of the files in a folder."""
    weight_map = document.root["weight_map"]
    return Index(
        folder,
        document.name,
        document.nbytes,
        document.root["metadata"],
        weight_map,
        tuple(dict.fromkeys(weight_map.values())),
    )


def locate(folder: Place) -> Place | None:
    """The file that stands for a folder: its index, or a whole `model.safetensors`; or None.

    Raises `ReadError` where there are several indexes, or several models and no index.
    """
    names = folder.names()
    found = [name for name in names if name.endswith(shard_index.SUFFIX) and name[0] != "."]
    indexes = [name for name in found if not name.endswith(_OTHER_INDEXES)]
    if len(indexes) > 1:
        raise ReadError(
            f"holds {len(indexes)} indexes: {', '.join(indexes)}",
            where=folder,
            hint=Hint("give one of them", _inspect(folder, indexes[0])),
            code="several-indexes",
        )
    stands = indexes or _wholes(names)
    if len(stands) > 1:
        raise _several(folder, stands)
    return folder.below(stands[0]) if stands else None


def _wholes(names: Collection[str]) -> list[str]:
    """The file of each whole model among some: of a model in two containers, the first.

    An adapter beside a model is no second one.
    """
    found = {stem: [n for n in files if n in names] for stem, files in _MODELS.items()}
    if found[STEM]:
        return found[STEM][:1]
    return [files[0] for files in found.values() if files]


def stem_of(place: Place) -> str:
    """What the shards of a model are to be called, whose file, folder or index lies at a place.

    That of an index is kept, and a file keeps what the libraries of Hugging Face call it.
    """
    if place.is_folder:
        place = locate(place) or place
    name = place.base.removesuffix(shard_index.SUFFIX)
    stem = next((stem for stem, files in _MODELS.items() if name in files), None)
    if stem is None and name != place.base:
        stem, _ = table.split_extension(name)
    if stem is None:  # a variant, such as `.fp16`, or one shard
        stem = next((known for known in _OF_OTHERS if re.match(rf"{known}[-.]", name)), None)
    return stem or STEM


def heads(names: Collection[str]) -> list[str]:
    """The files by which readers find safetensors models in a folder: indexes, whole ones."""
    whole = [files[0] for files in _MODELS.values()]
    return [
        name
        for name in names
        if name in whole or name.endswith(f".safetensors{shard_index.SUFFIX}")
    ]


def _several(folder: Place, names: list[str]) -> ReadError:
    return ReadError(
        f"holds {len(names)} models: {listed(names)}",
        where=folder,
        hint=Hint("give one of them", _inspect(folder, names[0])),
        code="several-models",
    )


def _check_one_model(folder: Place, place: Place) -> None:
    """Refuse a folder of several models, as accelerate numbers them; `place` is the first."""
    others = [name for name in folder.names() if _OTHER_MODEL.fullmatch(name)]
    if others:
        raise _several(folder, [place.base, *others])


_KINDS = {
    ".snapshot_metadata": "torchsnapshot",
    "saved_model.pb": "TensorFlow (SavedModel)",
    "manifest.ocdbt": "Orbax (JAX)",
    "_CHECKPOINT_METADATA": "Orbax (JAX)",
}
"""By the name of a file in it: what a folder was written by."""

_BESIDE = re.compile(r"(?i)optim|sched|scaler|rng|random_state|training_args|(?:^|[._-])opt[._-]")
"""Names of what is saved beside a model."""


def _checkpoints(folder: Place) -> list[str]:
    """The files that are called checkpoints: models first, what is saved beside them last."""
    named = [name for name in folder.names() if name.lower().endswith(EXTENSIONS)]
    files = [name for name in named if not name.startswith("._") and folder.below(name).is_file]
    return sorted(files, key=lambda name: _BESIDE.search(name) is not None)


def only_file(folder: Place) -> Place | None:
    """The only checkpoint in a folder; None where there are others, or it is one shard of many."""
    found = _checkpoints(folder)
    if len(found) != 1 or _NUMBERED.fullmatch(found[0]):
        return None
    return folder.below(found[0])


def missing(folder: Place, reading: Reading) -> ReadError:
    """The error for a folder in which no checkpoint is found: what could be meant instead."""
    if reading.salvages:
        return UnsupportedError(
            "is a folder in which no shard can be read",
            where=folder,
            hint=Hint(
                "recover its files one by one; see what is there", shell("ls", files=[folder.name])
            ),
        )
    kind = next((kind for name, kind in _KINDS.items() if folder.below(name).exists), None)
    if kind is not None:
        what = f"is a folder of {kind}, which ckptfix does not read"
        hint = Hint("load it with that, and save a state dict with torch.save")
        return UnsupportedError(what, where=folder, hint=hint)
    found = _checkpoints(folder)
    shards = [name for name in found if _NUMBERED.fullmatch(name)]
    if shards:
        index = _stem(shards[0]) + shard_index.SUFFIX
        return DamagedError(
            f"holds {len(shards)} shards, but no index ({index}) that says what is where",
            where=folder,
            hint=Hint("copy or download it too, or look at one shard", _inspect(folder, shards[0])),
            code="no-index",
        )
    if found:
        return ReadError(
            f"is a folder without an index; it holds {listed(found)}",
            where=folder,
            hint=Hint("give one of them", _inspect(folder, found[0])),
        )
    below = {name: one for name in folder.names() if (one := _one_in(folder.below(name)))}
    if below:
        names = listed([f"{name}/" for name in below])
        return ReadError(
            f"is a folder without a checkpoint of its own; these in it have one: {names}",
            where=folder,
            hint=Hint("give one of them", command("inspect", next(iter(below.values())).name)),
            code="folders-of-checkpoints",
        )
    hint = Hint("see what is there", shell("ls", files=[folder.name]))
    return ReadError("is a folder without a checkpoint", where=folder, hint=hint)


def _one_in(folder: Place) -> Place | None:
    """What to give for the checkpoint in a folder: that, or the first of its files; else None."""
    if not folder.is_folder:
        return None
    names = folder.names()
    if any(name.endswith(shard_index.SUFFIX) for name in names) or _wholes(names):
        return folder
    found = [name for name in names if name.lower().endswith(EXTENSIONS)]
    found.sort(key=lambda name: not name.endswith(".safetensors"))
    return folder.below(found[0]) if found else None


def _inspect(folder: Place, name: str) -> Command:
    return command("inspect", folder.below(name).name)


# --- reading


def read(index: Index, reading: Reading) -> Document:
    """The document in the files of an index: one mapping, in the order of the weight map."""
    _check_present(index)
    shards = {shard: _open(index.folder.below(shard), reading) for shard in index.shards}
    orders = {document.byteorder for document in shards.values()}
    if len(orders) > 1:
        raise UnsupportedError("its shards differ in byte order", where=index.name)
    notes = dict.fromkeys(note for document in shards.values() for note in document.notes)
    root = _assemble(index, shards)
    containers = sorted({document.container for document in shards.values()})
    return Document(
        root,
        f"{NAME} {' and '.join(containers)}",
        index.name,
        index.size + sum(document.nbytes for document in shards.values()),
        orders.pop(),
        metadata=_metadata(index, shards.values(), root),
        notes=(*notes, *_surplus_files(index)),
    )


def _check_present(index: Index) -> None:
    absent = [shard for shard in index.shards if not index.folder.below(shard).is_file]
    if absent:
        raise DamagedError(
            f"{len(absent)} of {len(index.shards)} shards are not there: {listed(absent)}",
            where=index.name,
            hint=Hint(
                "copy or download them too; see what is there",
                shell("ls", files=[index.folder.name]),
            ),
            code="shard-absent",
        )


def _open(place: Place, reading: Reading) -> Document:
    document = table.read_place(place, reading)
    if document.container == shard_index.NAME:
        raise UnsafeError("is an index in JSON, and an index names it as a shard", where=place)
    if not isinstance(document.root, dict):
        raise UnsupportedError(
            "is a shard that does not map names to tensors",
            where=place,
            hint=Hint("see what it holds", command("inspect", place.name)),
        )
    return document


def _assemble(index: Index, shards: Mapping[str, Document]) -> OrderedMap:
    """The keys of all shards in the order of the index, then the ties that it leaves out."""
    roots: dict[str, dict[Any, Node]] = {shard: shards[shard].root for shard in index.shards}
    root = OrderedMap()
    for key, shard in index.weight_map.items():
        kept = index.metadata.get(key, key)
        if key in roots[shard]:
            root[key] = roots[shard][key]
        elif kept in index.weight_map and kept in roots[index.weight_map[kept]]:
            root[key] = roots[index.weight_map[kept]][kept]
        else:
            raise _lacking(index, key, roots)
    for shard in index.shards:
        root.update(_ties_beside(index, shard, roots))
    for alias, kept in index.metadata.items():
        if alias not in root and isinstance(root.get(kept), Tensor):
            root[alias] = root[kept]
    root.attributes = _attributes(index, roots.values())
    return root


def _lacking(index: Index, key: str, roots: Mapping[str, dict[Any, Node]]) -> ReadError:
    shard = index.weight_map[key]
    holders = [other for other, root in roots.items() if key in root]
    instead = f" ({', '.join(holders)} does)" if holders else ""
    return DamagedError(
        f"puts {key!r} in {shard}, which does not hold it{instead}",
        where=index.name,
        hint=Hint("see what is in it", _inspect(index.folder, shard)),
        code="shard-lacks-key",
    )


def _ties_beside(index: Index, shard: str, roots: Mapping[str, dict[Any, Node]]) -> dict[str, Node]:
    """Keys of a shard that the map leaves out because they name a tensor that it names.

    Raises `UnsafeError` for any other key that the map does not put there.
    """
    placed = {key for key in roots[shard] if index.weight_map.get(key) == shard}
    left = {key: node for key, node in roots[shard].items() if key not in placed}
    if not left:
        return left
    views = {tensor.view for key in placed if (tensor := as_tensor(roots[shard][key])) is not None}
    for key, node in left.items():
        tensor = as_tensor(node)
        if key in index.weight_map or tensor is None or tensor.view not in views:
            raise _surplus_key(index, key, shard)
    return left


def _surplus_key(index: Index, key: Node, shard: str) -> ReadError:
    hint = Hint("see what is in it", _inspect(index.folder, shard))
    other = index.weight_map.get(key)
    if other is not None:
        what = f"{key!r} is in two shards, {other} and {shard}"
        return UnsafeError(what, where=index.name, hint=hint, code="key-in-two-shards")
    what = f"{shard} holds {key!r}, which the index does not name"
    return UnsafeError(what, where=index.name, hint=hint, code="key-not-in-index")


def _attributes(index: Index, roots: Iterable[dict[Any, Node]]) -> Node:
    """The module versions that the shards or the index keep."""
    versions = OrderedMap()
    for root in roots:
        versions.update(root.metadata or {} if isinstance(root, OrderedMap) else {})
    found = safetensors.attributes(index.metadata) or {"_metadata": {}}
    versions.update(found["_metadata"])
    return {"_metadata": versions} if versions else None


def _metadata(index: Index, shards: Iterable[Document], root: OrderedMap) -> dict[str, str]:
    """Texts that all shards agree on, and those of the index; ties and versions are in the tree."""
    common = set.intersection(*(set(document.metadata.items()) for document in shards))
    texts = {**dict(sorted(common)), **index.metadata}
    told = {safetensors.VERSIONS, TOTAL_SIZE, *root}
    return {key: text for key, text in texts.items() if key not in told}


def _surplus_files(index: Index) -> list[Finding]:
    """A note on files beside the index that look as if they belonged to it."""
    stems = {_stem(shard) for shard in index.shards}
    names = [name for name in index.folder.names() if name not in index.shards]
    whole = Place(index.name).base.removesuffix(shard_index.SUFFIX)
    found = [n for n in names if n == whole or (_NUMBERED.fullmatch(n) and _stem(n) in stems)]
    if not found:
        return []
    message = f"{listed(found)}: beside the shards, but not named in the index"
    return [Finding("surplus-shard", message)]


def _stem(shard: str) -> str:
    return _NUMBERED.sub(r"\g<stem>\g<extension>", shard)


# --- twins: the same checkpoint once more, in another container


def _twins(folder: Place, place: Place) -> list[str]:
    """The files of a folder that should hold the same as the one that is read."""
    here = folder.names()
    stem = place.base.removesuffix(shard_index.SUFFIX)
    others = [name for files in _MODELS.values() if stem in files for name in files if name != stem]
    names = [name + suffix for name in others for suffix in (shard_index.SUFFIX, "")]
    return [name for name in names if name in here][:1]


def _twin(document: Document, folder: Place, place: Place, name: str) -> Finding | None:
    """What is to be said of a twin: that it differs, or that it is there and was not compared."""
    other = folder.below(name)
    try:
        found = table.read_place(other, Reading())
        found = of_file(found, other, Reading()) or found
    except ReadError as error:
        return Finding("twin-differs", f"{name} lies beside it, and cannot be read: {error.what}")
    differing = _differing(document.root, found.root)
    compare = command("diff", place.name, other.name)
    if differing:
        what = f"{plural(len(differing), 'key')} of other shapes, dtypes or names"
        message = f"{name} lies beside it, and differs: {what} ({listed(differing)})"
        return Finding("twin-differs", message, command=compare)
    message = f"{name} lies beside it, with the same keys and shapes; values were not compared"
    return Finding("twin-beside", message, command=compare)


def _differing(one: Node, other: Node) -> list[str]:
    """The keys that are in one of two mappings, or not alike in both; ties may be left out."""
    if not isinstance(other, dict):
        return ["/"]
    ours, theirs = _described(one), _described(other)
    common = ours.keys() & theirs.keys()
    differing = [key for key in ours if key in common and ours[key][0] != theirs[key][0]]
    for side in (ours, theirs):
        held = {side[key][1] for key in common}
        differing += [key for key in side if key not in common and side[key][1] not in held]
    return list(map(str, differing))


def _described(root: dict[Any, Node]) -> dict[Any, tuple[Any, Any]]:
    """What each key holds: shape and dtype, or what kind of value; and which view of a storage."""
    found: dict[Any, tuple[Any, Any]] = {}
    for key, node in root.items():
        tensor = as_tensor(node)
        if tensor is None:
            found[key] = kind(node), None
        else:
            found[key] = (tensor.shape, tensor.dtype.name), tensor.view
    return found


# --- what is whole of it


def _weight_map(folder: Place, found: Salvage) -> Mapping[str, str]:
    """Key to shard as the index of a folder has it; empty where that cannot be read."""
    try:
        place = locate(folder)
        if place is None or not place.base.endswith(shard_index.SUFFIX):
            return {}
        document = table.read_place(place, found)
    except ReadError as error:
        found.skip("the index cannot be read", error)
        return {}
    return document.root["weight_map"] if document.container == shard_index.NAME else {}


def _of_one_model(folder: Place) -> list[str]:
    """The files of a folder without an index that are one model. Raises `ReadError` for several."""
    names = folder.names()
    whole = _wholes(names)
    if len(whole) > 1:
        raise _several(folder, whole)
    if whole:
        _check_one_model(folder, folder.below(whole[0]))
        return whole
    shards = [name for name in names if _NUMBERED.fullmatch(name) and name.endswith(EXTENSIONS)]
    models = {_stem(name) for name in shards}
    if len(models) > 1:
        raise ReadError(
            f"holds shards of {len(models)} models: {listed(sorted(models))}",
            where=folder,
            hint=Hint("see what is in one of them", _inspect(folder, shards[0])),
            code="several-models",
        )
    return shards


def _salvaged(
    folder: Place, weight_map: Mapping[str, str], names: Iterable[str], found: Salvage
) -> Document | None:
    """What the shards in a folder hold, as far as they can be read; None where there are none."""
    read = {name: _whole(folder.below(name), found) for name in names}
    shards = {name: document for name, document in read.items() if document is not None}
    if not shards:
        return None
    holders: dict[Any, list[str]] = {}
    for name, document in shards.items():
        for key in document.root:
            holders.setdefault(key, []).append(name)
    found.absent += [key for key in weight_map if key not in holders]
    order = dict.fromkeys([*(key for key in weight_map if key in holders), *holders])
    root = OrderedMap()
    for key in order:
        meant = weight_map.get(key)
        if meant not in holders[key]:
            meant, *others = holders[key]
            if others:
                what = f"{key!r} is in {len(others) + 1} files: {listed(holders[key])}"
                raise DamagedError(what, where=folder, code="key-in-two-shards")
        root[key] = shards[meant].root[key]
    return replace(next(iter(shards.values())), root=root, name=folder.name)


def _whole(place: Place, found: Salvage) -> Document | None:
    try:
        document = table.read_place(place, found)
    except ReadError as error:
        found.skip("a shard is lost", error)
        return None
    named = document.container != shard_index.NAME and isinstance(document.root, dict)
    return document if named else None
