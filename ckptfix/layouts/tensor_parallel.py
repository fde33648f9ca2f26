"""Files by rank of tensor parallelism: plain tensors, and no plan of how they were cut.

    consolidated.00.pth, consolidated.01.pth, …           Llama
    mp_rank_00_model_states.pt, mp_rank_01_model_…        DeepSpeed, where it keeps the model whole

Each is a checkpoint like any other. Some tensors in it are slices, along a dimension that is
written nowhere; others are whole and the same in every file. So a file is read for what it is, and
told to be one of several; a target's shapes say how they are joined (`match.joins`). A folder of
them has no document but that, and nothing is written of it before it is joined.

Sources: `llama/generation.py` of Llama 1 to 3, DeepSpeed's `runtime/engine.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptfix.findings import Finding
from ckptfix.formats import table
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.bytes.place import Place
    from ckptfix.formats.reading import Reading
    from ckptfix.tree.document import Document

NAME = "files of tensor parallelism"

_FILES = (
    re.compile(r"consolidated\.(\d+)\.pth"),
    re.compile(r"mp_rank_(\d+)_model_states\.pt"),
)
_PARTITIONED = "zero_pp_rank_"
"""How files begin in which ZeRO keeps what is not in those of the ranks."""


def of_file(document: Document, place: Place, reading: Reading) -> Document | None:
    """The document of the file at `place`, told to be one of several; None for other files."""
    for pattern in _FILES:
        if pattern.fullmatch(place.base):
            names = _ranks(pattern, place.folder.names())
            if len(names) > 1 or rank_of(place.base):
                return _told(document, [place.folder.below(name).name for name in names])
    return None


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document of the first of several such files in a folder; None for other folders."""
    names = folder.names()
    found = [ranks for one in _FILES if (ranks := _ranks(one, names))]
    if len(found) != 1 or len(found[0]) < 2 or any(_PARTITIONED in name for name in names):
        return None
    document, *_ = [table.read_place(folder.below(name), reading) for name in found[0]]
    told = _told(document, [folder.below(name).name for name in found[0]])
    return replace(told, name=folder.name, container=NAME)


def rank_of(name: str) -> int:
    """The rank in the name of a file. Raises `ValueError` for a name without one."""
    return next(int(found[1]) for one in _FILES if (found := one.fullmatch(name)))


def _ranks(pattern: re.Pattern[str], names: Iterable[str]) -> list[str]:
    """The names of one kind in the order of their ranks."""
    found = {name: int(match[1]) for name in names if (match := pattern.fullmatch(name))}
    return sorted(found, key=lambda name: (found[name], name))


def _told(document: Document, slices: list[str]) -> Document:
    names = listed(path.replace("\\\\", "/").rpartition("/")[2] for path in slices)
    message = (
        f"one of the files of {len(slices)} ranks of tensor parallelism ({names}), each with a "
        "slice of most tensors; the shapes of a model say how they are joined"
    )
    notes = (*document.notes, Finding("tensor-parallel", message))
    return replace(document, slices=tuple(slices), notes=notes)
