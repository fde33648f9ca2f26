"""A checkpoint in several files, as the libraries of Hugging Face write it.

    model-00001-of-00002.safetensors   the tensors that the index puts there, and no others
    model-00002-of-00002.safetensors   …
    model.safetensors.index.json       the index, a JSON object:
        {"metadata": {"total_size": 24, "dropped name": "kept name", …},
         "weight_map": {"key": "model-00001-of-00002.safetensors", …}}

Beside `pytorch_model.bin.index.json` the shards are torch's own containers. `total_size` counts the
bytes of tensors; text beside it says what a safetensors file would say in `__metadata__`: the
names of tied tensors that were dropped, for the name that is kept. Dropped names stand neither in
`weight_map` nor as tensors in a shard, and no tie goes from one shard to another, because loaders
take each key from the shard that the map names. A checkpoint that fits into one shard is
`model.safetensors` and has no index. Source: huggingface_hub's `serialization/_torch.py` and
`_base.py` (0.30).

This module reads; `sharding` writes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.bytes import journal
from ckptfix.contents.tensors import as_tensor
from ckptfix.errors import DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats import safetensors
from ckptfix.formats.containers import EXTENSIONS
from ckptfix.limits import DEFAULT, Limits
from ckptfix.tree.document import Document, Node, OrderedMap, Tensor
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ckptfix.bytes.source import Source

    ReadShard = Callable[[str, Limits], Document]

SUFFIX = ".index.json"
WHOLE = "model.safetensors"
"""The file of a checkpoint that fits into one."""
TOTAL_SIZE = "total_size"

_OTHER_INDEXES = (".h5.index.json", ".msgpack.index.json")  # of TensorFlow and Flax
_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-\d+(?P<extension>\.\w+)")


class Index(NamedTuple):
    """What an index says. `name` is what messages call it, `shards` are in order."""

    folder: str
    name: str
    size: int
    metadata: Mapping[str, str]
    weight_map: Mapping[str, str]
    shards: tuple[str, ...]


# --- finding the index


def matches(source: Source) -> bool:
    """Whether a file is meant to be an index: JSON, and named like one or with a `weight_map`."""
    head = source.head().lstrip()
    named = source.name.endswith(SUFFIX)
    return head.startswith(b"{") and (named or b'"weight_map"' in head)


def locate(folder: str | os.PathLike[str]) -> str | None:
    """The file that stands for a folder: its index, or a whole `model.safetensors`; or None.

    Raises `ReadError` where there are several indexes.
    """
    names = names_in(folder)
    found = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    indexes = [name for name in found if not name.endswith(_OTHER_INDEXES)]
    if len(indexes) > 1:
        raise ReadError(
            f"{folder}: holds {len(indexes)} indexes: {', '.join(indexes)}",
            hint=f"give one of them: ckptfix inspect {_quoted(folder, indexes[0])}",
            code="several-indexes",
        )
    stands = indexes or [name for name in names if name == WHOLE]
    return os.path.join(folder, stands[0]) if stands else None


def missing(folder: str | os.PathLike[str]) -> ReadError:
    """The error for a folder in which no checkpoint is found: what could be meant instead."""
    found = [name for name in names_in(folder) if name.lower().endswith(EXTENSIONS)]
    if len(found) == 1:
        return ReadError(
            f"{folder}: is a folder without an index",
            hint=f"give the checkpoint in it: ckptfix inspect {_quoted(folder, found[0])}",
        )
    shards = [name for name in found if _NUMBERED.fullmatch(name)]
    if shards:
        index = _stem(shards[0]) + SUFFIX
        return DamagedError(
            f"{folder}: holds {len(shards)} shards, but no index ({index}) that says what is where",
            hint=f"copy or download it too, or look at one shard: "
            f"ckptfix inspect {_quoted(folder, shards[0])}",
            code="no-index",
        )
    if found:
        return ReadError(
            f"{folder}: is a folder without an index; it holds {listed(found)}",
            hint=f"give one of them: ckptfix inspect {_quoted(folder, found[0])}",
        )
    hint = f"see what is there: ls {shlex.quote(os.fspath(folder))}"
    return ReadError(f"{folder}: is a folder without a checkpoint", hint=hint)


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """What a folder holds, sorted. Raises `ReadError`."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ReadError(f"{folder}: {(error.strerror or str(error)).lower()}") from None


def _quoted(folder: str | os.PathLike[str], name: str) -> str:
    return shlex.quote(os.path.join(folder, name))


# --- reading


def read(
    source: Source, read_shard: ReadShard, limits: Limits = DEFAULT, name: str | None = None
) -> Document:
    """The document in a folder, given its index: one mapping, in the order of the weight map.

    `read_shard` reads the structure of one file. Raises `ReadError` and its kin where the folder
    does not hold exactly what the index says.
    """
    index = parse(source, limits)
    _check_present(index)
    shards = {
        shard: _open(os.path.join(index.folder, shard), read_shard, limits)
        for shard in index.shards
    }
    orders = {document.byteorder for document in shards.values()}
    if len(orders) > 1:
        raise UnsupportedError(f"{index.name}: its shards differ in byte order")
    notes = dict.fromkeys(note for document in shards.values() for note in document.notes)
    root = _assemble(index, shards)
    return Document(
        root,
        "sharded " + " and ".join(sorted({document.container for document in shards.values()})),
        name or index.name,
        index.size + sum(document.nbytes for document in shards.values()),
        orders.pop(),
        metadata=_metadata(index, shards.values(), root),
        notes=(*notes, *_surplus_files(index)),
    )


def parse(source: Source, limits: Limits) -> Index:
    """What an index says. Raises `DamagedError`, or `UnsafeError` for names outside its folder."""
    name = source.name
    if source.size > limits.header_bytes:
        raise UnsafeError(
            f"{name}: an index of {source.size} bytes; more than {limits.header_bytes} are refused"
        )

    content = _json(source)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError(f"{name}: the index names no shards", hint=_ASK_AGAIN, code="no-shards")
    _check_names(weight_map, name)
    metadata = content.get("metadata")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return Index(
        os.path.dirname(name),
        name,
        source.size,
        {key: text for key, text in texts if isinstance(text, str)},
        weight_map,
        tuple(dict.fromkeys(weight_map.values())),
    )


def _json(source: Source) -> dict[str, Any]:
    """The object in a JSON file, none of whose keys stands twice: readers disagree on those."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UnsafeError(f"{source.name}: names {key!r} twice", hint=_ASK_AGAIN)
            found[key] = value
        return found

    try:
        content = json.loads(source.read(0, source.size), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        message = f"{source.name}: the index is no JSON ({error})"
        raise DamagedError(message, hint=_ASK_AGAIN) from None
    return content if isinstance(content, dict) else {}


def _check_names(weight_map: Mapping[str, Node], name: str) -> None:
    for key, shard in weight_map.items():
        if not _is_plain(shard):
            raise UnsafeError(
                f"{name}: puts {key!r} in {shard!r}, which is not a name of a shard beside it",
                hint="a shard is named like model-00001-of-00002.safetensors, without a path",
                code="shard-name",
            )


_ASK_AGAIN = "copy or download the index again"


def _is_plain(shard: Node) -> bool:
    """Whether a name stays in its folder on every system, and is the name of a checkpoint.

    Folders below it are let be; Windows drops dots and spaces at the end of each part.
    """
    if not isinstance(shard, str) or not shard.lower().endswith(EXTENSIONS):
        return False
    parts = shard.split("/")
    return shard.isprintable() and all(
        part and part == part.rstrip(". ") and not set(part) & set('\\:*?"<>|') for part in parts
    )


def _check_present(index: Index) -> None:
    absent = [s for s in index.shards if not os.path.isfile(os.path.join(index.folder, s))]
    if absent:
        raise DamagedError(
            f"{index.name}: {len(absent)} of {len(index.shards)} shards are not there: "
            f"{listed(absent)}",
            hint=f"copy or download them too; see what is there: ls "
            f"{shlex.quote(index.folder or '.')}",
            code="shard-absent",
        )


def _open(path: str, read_shard: ReadShard, limits: Limits) -> Document:
    journal.recover(path)
    document = read_shard(path, limits)
    if not isinstance(document.root, dict):
        raise UnsupportedError(
            f"{path}: a shard that maps no names to tensors",
            hint=f"see what it holds: ckptfix inspect {shlex.quote(path)}",
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
        f"{index.name}: puts {key!r} in {shard}, which does not hold it{instead}",
        hint=f"see what is in it: ckptfix inspect {_quoted(index.folder, shard)}",
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
    hint = f"see what is in it: ckptfix inspect {_quoted(index.folder, shard)}"
    other = index.weight_map.get(key)
    if other is not None:
        message = f"{index.name}: {key!r} is in two shards, {other} and {shard}"
        return UnsafeError(message, hint=hint, code="key-in-two-shards")
    message = f"{index.name}: {shard} holds {key!r}, which the index does not name"
    return UnsafeError(message, hint=hint, code="key-not-in-index")


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
    names = [name for name in names_in(index.folder or ".") if name not in index.shards]
    whole = os.path.basename(index.name).removesuffix(SUFFIX)
    found = [n for n in names if n == whole or (_NUMBERED.fullmatch(n) and _stem(n) in stems)]
    if not found:
        return []
    message = f"{listed(found)}: beside the shards, but not named in the index"
    return [Finding("surplus-shard", message)]


def _stem(shard: str) -> str:
    return _NUMBERED.sub(r"\g<stem>\g<extension>", shard)
