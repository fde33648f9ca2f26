"""Writing a checkpoint into a folder of safetensors shards; `sharded` describes the format.

At every moment the folder holds the old checkpoint or the new one, whole: new shards have names
that are free, the index is replaced at once, and only then are the old shards removed. Each file
is written as `files.replacing` does, and the whole is read back through the new index before that
gets its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptfix.bytes.journal import alone_in
from ckptfix.bytes.place import (
    check_folder,
    folder_of,
    replacing,
    sync_folder,
    without_slash,
    write_error,
)
from ckptfix.bytes.source import FileSource
from ckptfix.errors import CkptfixError, OutputExistsError, VerifyError, WriteError
from ckptfix.formats import safetensors
from ckptfix.formats.containers import MAX_SHARD_SIZE
from ckptfix.layouts import shards
from ckptfix.limits import DEFAULT
from ckptfix.tree.document import OrderedMap
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ckptfix.layouts.shards import ReadShard
    from ckptfix.tree.document import Document, Node

    WriteShard = Callable[[Document, str], None]

_INDEX = shards.WHOLE + shards.SUFFIX
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")


def check_output(folder: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse early what could not be written later. Raises `WriteError`."""
    if os.path.exists(without_slash(folder)) and not os.path.isdir(folder):
        raise WriteError(f"{folder}: is a file, not a folder", hint="give another name for OUT")
    check_folder(folder, folder_of(folder))
    former = sorted(_former(folder))
    if former and not force:
        raise OutputExistsError(f"holds a checkpoint already ({listed(former)})", where=folder)


def write(
    document: Document,
    folder: str | os.PathLike[str],
    read_shard: ReadShard,
    write_shard: WriteShard,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    force: bool = False,
) -> None:
    """Write a state dict (see `edits.flatten`) in shards of at most so many bytes of tensors.

    A tensor that is larger has a shard for itself; what fits into one shard is written as
    `model.safetensors`, without an index. `write_shard` writes one file, whole or not at all,
    and replaces it where it is there. With `force` a checkpoint in the folder is removed once the
    new one is in place. Where something goes wrong before that, what was written is removed.
    Raises `WriteError`; also where another process is writing there.
    """
    check_output(folder, force=force)
    made = _make(folder)
    with alone_in(folder):
        check_output(folder, force=force)  # another process may have written there meanwhile
        former = _former(folder)
        _refuse_input(document, folder, former)
        groups = _split(document.root, max_shard_size)
        names = _free_names(len(groups), former)
        with _undone_on_error(folder, made) as written:
            for name, group in zip(names, groups, strict=True):
                part = document if len(groups) == 1 else replace(document, root=group)
                write_shard(part, os.path.join(folder, name))
                written.append(name)
            if len(groups) > 1:
                weight_map = dict(zip(names, groups, strict=True))
                _write_index(_index(document, weight_map), document, folder, read_shard)
                written.append(_INDEX)
        _remove(folder, former.difference(written))


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


def _free_names(count: int, former: set[str]) -> list[str]:
    """Names for shards, none of which the former checkpoint has: it stays whole until the end."""
    if count == 1:
        return [shards.WHOLE]
    number, stem = 1, "model"
    while True:
        names = [f"{stem}-{place:05d}-of-{count:05d}.safetensors" for place in range(1, count + 1)]
        if former.isdisjoint(names):
            return names
        number += 1
        stem = f"model-{number}"


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


def _write_index(
    index: bytes, document: Document, folder: str | os.PathLike[str], read_shard: ReadShard
) -> None:
    """Put the index in its place, once the folder reads back through it as the document."""

    def verify(written: str) -> None:
        try:
            found = shards.read(FileSource(written), read_shard)
        except CkptfixError as error:
            raise VerifyError(f"{folder}: does not read back: {error}") from error
        place = safetensors.difference(document, found)
        if place is not None:
            raise VerifyError(f"{folder}: reads back differently at {place}")

    with replacing(os.path.join(folder, _INDEX), force=True, verify=verify) as sink:
        sink.write(index)


# --- what is in the folder already


def _former(folder: str | os.PathLike[str]) -> set[str]:
    """The files of a checkpoint that ckptfix or huggingface_hub left in a folder."""
    if not os.path.isdir(folder):
        return set()
    names = set(shards.names_in(folder))
    found = {name for name in names if name in (shards.WHOLE, _INDEX) or _SHARD.fullmatch(name)}
    return found | names.intersection(_named_by_index(folder) if _INDEX in names else ())


def _named_by_index(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The shards of the index that is there; none where it cannot be read."""
    try:
        return shards.parse(FileSource(os.path.join(folder, _INDEX)), DEFAULT).shards
    except CkptfixError:
        return ()


def _refuse_input(document: Document, folder: str | os.PathLike[str], former: set[str]) -> None:
    """The input stays as it is, so it cannot be what is replaced."""
    source = document.name
    if not (os.path.isdir(folder) and os.path.exists(source)):
        return
    inside = os.path.basename(source) in former and os.path.samefile(folder_of(source), folder)
    if inside or os.path.samefile(source, folder):
        raise WriteError(
            f"{folder}: holds the input itself",
            hint="give another folder for the output",
            code="same-file",
        )


@contextlib.contextmanager
def _undone_on_error(folder: str | os.PathLike[str], made: bool) -> Iterator[list[str]]:
    """What was written to a folder, by name, is removed where the block fails; so is one `made`."""
    written: list[str] = []
    try:
        yield written
    except BaseException:
        if set(written).isdisjoint(_named_by_index(folder)):  # else it is in place already
            for name in written:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def _make(folder: str | os.PathLike[str]) -> bool:
    """Make a folder where it is not there; whether it was made."""
    if os.path.isdir(folder):
        return False
    try:
        os.mkdir(folder)
    except FileExistsError:  # another process was faster
        return False
    except OSError as error:
        raise write_error(folder, error) from None
    sync_folder(folder_of(folder))
    return True


def _remove(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove files of the former checkpoint: first those by which readers find it."""
    heads = (_INDEX, shards.WHOLE)
    for name in sorted(names, key=lambda name: (name not in heads, name)):
        try:
            os.unlink(os.path.join(folder, name))
        except OSError as error:
            raise write_error(os.path.join(folder, name), error) from None
    sync_folder(folder)
