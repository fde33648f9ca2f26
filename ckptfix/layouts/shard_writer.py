"""Writing a checkpoint into a folder of safetensors shards; `shards` describes the format.

At every moment the folder holds the old checkpoint or the new one, whole: new shards have names
that are free, the index is replaced at once, and only then are the old shards removed. Each file
is published as every other, and the whole is read back through the new index before that gets its
name.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.place import Place
from ckptfix.errors import CkptfixError, OutputExistsError, VerifyError, WriteError
from ckptfix.formats import safetensors, shard_index
from ckptfix.formats.reading import Reading
from ckptfix.formats.table import SAFETENSORS, write_place
from ckptfix.layouts import companions, dcp, shards
from ckptfix.tree.document import OrderedMap
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ckptfix.bytes.copy import Checked
    from ckptfix.bytes.place import Progress
    from ckptfix.tree.document import Document, Node

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one shard of a folder, as huggingface_hub has it."""

_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


class Former(NamedTuple):
    """What is in a folder already."""

    stem: str
    """What the new shards are called."""
    files: set[str]
    """The files of the checkpoint of that name, which is replaced: its index, its shards."""
    names: set[str]

    @property
    def whole(self) -> str:
        """The file of a checkpoint that fits into one."""
        return f"{self.stem}.safetensors"

    @property
    def index_name(self) -> str:
        """The name of the index."""
        return self.whole + shard_index.SUFFIX


def check_free(folder: Place, *, force: bool) -> None:
    """Refuse early what could not be written later. Raises `WriteError`."""
    if Place(folder.name.rstrip("/")).exists and not folder.is_folder:
        raise WriteError("is a file, not a folder", where=folder, hint="give another name for OUT")
    folder.check_folder()
    if force or not folder.is_folder:
        return
    there = folder.names()
    found = {*shards.heads(there), *(name for name in there if _SHARD.fullmatch(name))}
    found |= dcp.files(there)
    if found:
        what = f"holds a checkpoint already ({listed(sorted(found))})"
        raise OutputExistsError(what, where=folder)


def removed(document: Document, folder: Place) -> list[str]:
    """The files that writing a document into a folder would remove, in the order of their names.

    Raises `WriteError` where it is not to be written there.
    """
    return sorted(_former(document, folder).files)


def write(
    document: Document,
    folder: Place,
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    verify: bool = False,
    texts: Iterable[Place] = (),
) -> Checked:
    """Write a state dict of dense tensors in shards of at most so many bytes of tensors.

    A tensor that is larger has a shard for itself; what fits into one shard is written as
    `model.safetensors`, without an index. Shards are called as those of the input. `texts` are
    copied beside them, where the folder has none of their names. With `force` a checkpoint of the
    same name in the folder is removed once the new one is in place: what its index names, and
    nothing else. Where something goes wrong before that, what was written is removed.
    `verify` and what is returned are those of `write_place`. Raises `WriteError`; also where
    another process is writing there.
    """
    known: set[Checked] = set()
    with replaced(document, folder, _named_by_index, force=force) as (former, written):
        groups = _split(document.root, max_shard_size)
        names = _free_names(len(groups), former)
        written += filter(None, (companions.carry(text, folder) for text in texts))
        for name, group in zip(names, groups, strict=True):
            part = document if len(groups) == 1 else replace(document, root=group)
            place = folder.below(name)
            known.add(
                write_place(part, place, SAFETENSORS, force=True, progress=progress, verify=verify)
            )
            written.append(name)
        if len(groups) > 1:
            index = _index(document, dict(zip(names, groups, strict=True)))
            _write_index(index, document, folder.below(former.index_name))
            written.append(former.index_name)
    return min(known, key=("copied", "shared", "checked", "verified").index)


def _split(root: Mapping[str, Node], max_shard_size: int) -> list[OrderedMap]:
    """The tensors of each shard in the order of the keys, each with all of its names."""
    tensors, aliases = safetensors.without_ties(root)
    groups, filled = [OrderedMap()], 0
    home: dict[str, OrderedMap] = {}
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > max_shard_size:
            groups.append(OrderedMap())
            filled = 0
        filled += tensor.nbytes
        home[name] = groups[-1]
        groups[-1][name] = tensor
    for alias, kept in aliases.items():
        home[kept][alias] = tensors[kept]
    return groups


def _free_names(count: int, former: Former) -> list[str]:
    """Names for shards that nothing in the folder has: what is there stays whole until the end."""
    if count == 1:
        return [former.whole]
    number, stem = 1, former.stem
    while True:
        names = [f"{stem}-{place:05d}-of-{count:05d}.safetensors" for place in range(1, count + 1)]
        if former.names.isdisjoint(names):
            return names
        number += 1
        stem = f"{former.stem}-{number}"


def _index(document: Document, files: Mapping[str, OrderedMap]) -> bytes:
    """The index as huggingface_hub has it: names that were dropped stand in the metadata only."""
    tensors, aliases = safetensors.without_ties(document.root)
    places = {key: shard for shard, group in files.items() for key in group}
    metadata = {
        **document.metadata,
        **aliases,
        **safetensors.module_versions(document.root),
        shards.TOTAL_SIZE: sum(tensor.nbytes for tensor in tensors.values()),
    }
    content = {"metadata": metadata, "weight_map": {key: places[key] for key in tensors}}
    return json.dumps(content, indent=2).encode() + b"\n"


def _write_index(index: bytes, document: Document, place: Place) -> None:
    """Put the index in its place, once the folder reads back through it as the document."""
    folder = place.folder

    def check(written: Place) -> None:
        try:
            told = shards.index_of(shard_index.read(written.open()), folder)
            found = shards.read(told, Reading(document.limits))
        except CkptfixError as error:
            raise VerifyError(f"does not read back: {error}", where=folder) from error
        differs = safetensors.difference(document, found)
        if differs is not None:
            raise VerifyError(f"reads back differently at {differs}", where=folder)

    with place.publish(force=True, check=check) as sink:
        sink.write(index)


# --- what is in the folder already


def _former(document: Document, folder: Place) -> Former:
    """What is in a folder, into which a document is to be written. Raises `WriteError`."""
    names = set(folder.names()) if folder.is_folder else set[str]()
    _refuse_input(document, folder, names)
    former = Former(shards.stem_of(Place(document.name)), set(), names)
    heads = {former.whole, former.index_name}
    others = [head for head in shards.heads(sorted(names)) if head not in heads]
    if others:
        raise WriteError(
            f"holds another checkpoint ({listed(others)}), which {former.whole} would not replace",
            where=folder,
            hint="give another folder for the output",
            code="several-models",
        )
    former.files.update(names & {*heads, *_named_by_index(folder, former)}, dcp.files(names))
    return former


def _named_by_index(folder: Place, former: Former) -> tuple[str, ...]:
    """The shards of the index that is there; none where it cannot be read."""
    try:
        document = shard_index.read(folder.below(former.index_name).open())
    except CkptfixError:
        return ()
    return shards.index_of(document, folder).shards


def _refuse_input(document: Document, folder: Place, names: set[str]) -> None:
    """The input stays as it is, so it cannot be what is replaced, nor lie beside what is new."""
    source = Place(document.name)
    shard = _SHARD.fullmatch(source.base) or source.base in shards.heads(names)
    inside = shard and source.exists and source.folder.is_same(folder)
    if inside or source.is_same(folder):
        raise WriteError(
            "holds the input itself",
            where=folder,
            hint="give another folder for the output",
            code="same-file",
        )


@contextlib.contextmanager
def replaced(
    document: Document,
    folder: Place,
    named: Callable[[Place, Former], Iterable[str]],
    *,
    force: bool,
) -> Iterator[tuple[Former, list[str]]]:
    """The checkpoint in a folder, if there is one, is replaced by what the block writes there.

    The block is given what is there, which has to stay until the end, and appends the names of what
    it writes. These files are removed where it fails, unless the head of the folder tells of them
    already: `named` gives the files that it names. Raises `WriteError`.
    """
    check_free(folder, force=force)
    made = folder.make_folder()
    with folder.alone():
        check_free(folder, force=force)  # another process may have written there meanwhile
        former = _former(document, folder)
        with _undone_on_error(folder, former, named, made) as written:
            yield former, written
        _remove(folder, former, former.files.difference(written))


@contextlib.contextmanager
def _undone_on_error(
    folder: Place,
    former: Former,
    named: Callable[[Place, Former], Iterable[str]],
    made: bool,
) -> Iterator[list[str]]:
    """What was written to a folder, by name, is removed where the block fails; so is one `made`."""
    written: list[str] = []
    try:
        yield written
    except BaseException:
        if set(written).isdisjoint(named(folder, former)):  # else it is in place already
            for name in written:
                with contextlib.suppress(WriteError):
                    folder.below(name).remove()
        if made:
            with contextlib.suppress(WriteError):
                folder.remove_folder()
        raise


def _remove(folder: Place, former: Former, names: Iterable[str]) -> None:
    """Remove files of the former checkpoint: first those by which readers find it."""
    heads = (dcp.METADATA, former.index_name, former.whole)
    for name in sorted(names, key=lambda name: (name not in heads, name)):
        folder.below(name).remove()
    folder.sync()
