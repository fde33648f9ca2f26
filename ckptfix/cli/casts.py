"""What `convert --dtype` says: how much was cast, and what the cast lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.cli import output
from ckptfix.edit import casting
from ckptfix.words import plural

if TYPE_CHECKING:
    from ckptfix.cli import answers
    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.edit.casting import Cast
    from ckptfix.tree.document import Document
    from ckptfix.tree.dtypes import DType

_SHOWN = 5
_LOSSES = {
    "overflow": "beyond the range of {dtype}",
    "underflow": "too small for {dtype}, zero now",
    "nan": "NaN before and after",
}


def said(states: list[StateDict], dtype: DType) -> str:
    """How many tensors of state dicts are cast."""
    return f"{casting.count(states, dtype):,} of them cast to {dtype}"


def report(document: Document, dtype: DType, *, dry_run: bool) -> answers.Casts:
    """Say what was lost by casting, and what was not cast; returns the same for JSON."""
    if dry_run:
        casting.measure(document)
    casts = casting.casts(document)
    if dry_run:
        names = ((key, cast.before) for cast in casts for key in cast.keys)
        output.changes([f"{key}: {before} -> {dtype}" for key, before in names], "tensor")
    for loss, what in _LOSSES.items():
        _note_losses(casts, loss, what.format(dtype=dtype))
    others = casting.others(document, dtype)
    if others:
        count = plural(len(others), "other floating-point tensor")
        what = f"{count} not cast, outside state dicts (an optimizer) or not dense"
        output.note_names(what, others, _SHOWN)
    return {"dtype": dtype.name, "tensors": [_row(cast) for cast in casts], "not_cast": others}


def _note_losses(casts: list[Cast], loss: str, what: str) -> None:
    rows = [(cast.keys[0], getattr(cast.losses, loss)) for cast in casts]
    rows = sorted(((key, count) for key, count in rows if count), key=lambda row: -row[1])
    if rows:
        total = plural(sum(count for _, count in rows), "value")
        names = [f"{key} ({count:,})" for key, count in rows]
        output.note_names(f"{total} {what}", names, _SHOWN)


def _row(cast: Cast) -> answers.Cast:
    return {
        "keys": list(cast.keys),
        "dtype": cast.before.name,
        "elements": cast.numel,
        "overflow": cast.losses.overflow,
        "underflow": cast.losses.underflow,
        "nan": cast.losses.nan,
    }
