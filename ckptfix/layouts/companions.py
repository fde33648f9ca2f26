"""What lies in a folder beside the weights: its config, tokenizer, licence, and all the rest.

Where a folder is written from a folder, the small texts go with the weights: without its
`config.json` nobody can load them. Whatever else is there, such as the state of an optimizer in a
file of its own, is for whoever writes to name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.place import Place
from ckptfix.bytes.source import FileSource, everything
from ckptfix.bytes.span import Span
from ckptfix.formats import shard_index
from ckptfix.tree.walk import storages

if TYPE_CHECKING:
    from ckptfix.tree.document import Document

_TEXTS = re.compile(
    r"(?i).+\.(json|txt|model|jinja|py|md|ya?ml|tiktoken|bpe|vocab)|(licen[sc]e|notice|use_policy)\b.*"
)
"""What a model is loaded with, and what has to go with it."""
_LARGEST = 100_000_000
"""Bytes of a text that is carried along."""
_READ = re.compile(r".*\.distcp|(meta|common)\.pt|.*\.index\.[\w.-]*json")
"""What was read although no tensor lies in it, or perhaps none."""


class Companions(NamedTuple):
    """What lies in the folder of a checkpoint beside what was read of it."""

    texts: list[Place]
    others: list[Place]


NOBODY = Companions([], [])


def of(document: Document, place: Place) -> Companions:
    """What lies around a document in the folder, or beside the index, that it was read from."""
    if place.name.endswith(shard_index.SUFFIX) and place.is_file:
        place = place.folder
    elif not place.is_folder or _is_unpacked(document):
        return NOBODY
    files = [Place(path) for path in _files(document)]
    texts, others = list[Place](), list[Place]()
    for name in place.names():
        one = place.below(name)
        if name.startswith(".") or _READ.fullmatch(name) or _is_read(one, files):
            continue
        is_text = _TEXTS.fullmatch(name) and one.is_file and one.nbytes <= _LARGEST
        (texts if is_text else others).append(one)
    return Companions(texts, others)


def _is_unpacked(document: Document) -> bool:
    """Whether a folder is an archive that was unpacked: all that is in it is a part of it."""
    return any(note.code == "container-refused" for note in document.notes)


def _files(document: Document) -> set[str]:
    """The files in which the bytes of a document lie."""
    spans = [span for storage in storages(document.root) for span in storage.spans]
    sources = {id(span.source): span.source for span in spans}
    found = (inner for source in sources.values() for inner in everything(source))
    return {Place(one.name).resolved for one in found if isinstance(one, FileSource)}


def _is_read(one: Place, files: list[Place]) -> bool:
    if one.is_folder:
        return any(file.is_below(one) for file in files)
    return any(file.name == one.resolved for file in files)


def is_there(text: Place, folder: Place) -> bool:
    """Whether a folder has another file of that name already."""
    other = folder.below(text.base)
    return other.exists and not _equal(text, other)


def _equal(one: Place, other: Place) -> bool:
    return other.is_file and other.nbytes == one.nbytes and _bytes(one) == _bytes(other)


def _bytes(place: Place) -> bytes:
    return place.open().read(0, place.nbytes)


def carry(text: Place, folder: Place) -> str | None:
    """Copy a text into a folder that has none of its name; returns the name, None where it has."""
    final = folder.below(text.base)
    if final.exists:
        return None
    source = text.open()
    with final.publish() as sink:
        sink.copy(Span(source, 0, source.size), text.base)
    return text.base
