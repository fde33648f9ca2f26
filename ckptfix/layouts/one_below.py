"""A folder in which the folder of a checkpoint in pieces stands, such as `checkpoint-500/`.

accelerate saves two of them, of the model (`pytorch_model_fsdp_0`) and of its optimizer
(`optimizer_0`); the folder above is both. Where several could be meant, none is taken. Source:
accelerate's `utils/fsdp_utils.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ckptfix.errors import ReadError
from ckptfix.hints import Hint, command
from ckptfix.layouts import dcp
from ckptfix.words import listed

if TYPE_CHECKING:
    from ckptfix.bytes.place import Place
    from ckptfix.formats.reading import Reading
    from ckptfix.tree.document import Document

_ACCELERATE = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in the only such folder in `folder`; None where there is none.

    Raises `ReadError` where there are several.
    """
    found = [name for name in folder.names() if _holds_pieces(folder.below(name))]
    if not found:
        return None
    halves = len(found) == 2 and all(_ACCELERATE.fullmatch(name) for name in found)
    if len(found) > 1 and not halves:
        raise ReadError(
            f"holds {len(found)} checkpoints in folders: {listed(found)}",
            where=folder,
            hint=Hint("give one of them", command("inspect", folder.below(found[-1]).name)),
            code="several-checkpoints",
        )
    parts = [dcp.of_folder(folder.below(name), reading) for name in sorted(found, reverse=True)]
    return dcp.together([part for part in parts if part is not None], folder)


def _holds_pieces(folder: Place) -> bool:
    """Whether a folder of DCP's is there; not where it cannot be looked into."""
    try:
        return folder.is_folder and bool(dcp.heads(folder.names()))
    except ReadError:
        return False
