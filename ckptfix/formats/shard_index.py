"""The index of a checkpoint in several files: a JSON object that says which key is in which.

    {"metadata": {"total_size": 24, "dropped name": "kept name", …},
     "weight_map": {"key": "model-00001-of-00002.safetensors", …}}

The document of an index is that object, once every shard that it names is sure to lie beside it.
What its shards hold is for `layouts.shards`. Source: huggingface_hub's `serialization/_base.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ckptfix.errors import DamagedError, UnsafeError
from ckptfix.formats.table import EXTENSIONS
from ckptfix.limits import DEFAULT, Limits
from ckptfix.tree.document import Document

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage
    from ckptfix.tree.document import Node

NAME = "shard index"
SUFFIX = ".index.json"

_ASK_AGAIN = "copy or download the index again"


def recognises(source: Source) -> bool:
    """Whether a file is meant to be an index: JSON, and named like one or with a `weight_map`."""
    head = source.head().lstrip()
    named = source.name.endswith(SUFFIX)
    return head.startswith(b"{") and (named or b'"weight_map"' in head)


def read(source: Source, limits: Limits = DEFAULT) -> Document:
    """What an index says: `weight_map` (key to shard), and the texts in `metadata`.

    Raises `DamagedError`, or `UnsafeError` for names outside of its folder.
    """
    if source.size > limits.header_bytes:
        raise UnsafeError(
            f"is an index of {source.size} bytes; more than {limits.header_bytes} are refused",
            where=source.name,
        )
    content = _json(source)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        what = "the index names no shards"
        raise DamagedError(what, where=source.name, hint=_ASK_AGAIN, code="no-shards")
    _check_names(weight_map, source.name)
    metadata = content.get("metadata")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    root = {
        "metadata": {key: text for key, text in texts if isinstance(text, str)},
        "weight_map": weight_map,
    }
    return Document(root, NAME, source.name, source.size)


def salvage(source: Source, found: Salvage) -> Document:
    """As `read`: of an index that is damaged nothing can be believed."""
    return read(source, found.limits)


def _json(source: Source) -> dict[str, Any]:
    """The object in a JSON file, none of whose keys stands twice: readers disagree on those."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UnsafeError(f"names {key!r} twice", where=source.name, hint=_ASK_AGAIN)
            found[key] = value
        return found

    try:
        content = json.loads(source.read(0, source.size), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        what = f"the index is not JSON ({error})"
        raise DamagedError(what, where=source.name, hint=_ASK_AGAIN) from None
    return content if isinstance(content, dict) else {}


def _check_names(weight_map: Mapping[str, Node], name: str) -> None:
    for key, shard in weight_map.items():
        if not _is_plain(shard):
            raise UnsafeError(
                f"puts {key!r} in {shard!r}, which is not a name of a shard beside it",
                where=name,
                hint="a shard is named like model-00001-of-00002.safetensors, without a path",
                code="shard-name",
            )


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
