"""Why a checkpoint does not fit a target, in one sentence: what differs, and what to do about it.

A head for another number of classes, another vocabulary, other positions, a buffer too many and
the wrong model altogether look alike in a list of keys; people need to tell them apart.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.packed import packed_weights
from ckptfix.errors import KeyMismatchError
from ckptfix.hints import Command, Hint, command
from ckptfix.keys.renaming import prefix_of
from ckptfix.match.transposes import is_transposed
from ckptfix.report import EXPANDED, META, describe, kinds_of, shape
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.match.target import Target
    from ckptfix.report import Difference, Report
    from ckptfix.tree.document import Document


class Cause(NamedTuple):
    """What differs, and what to do about it."""

    what: str
    hint: Hint | str


def error(
    document: Document, state: StateDict, report: Report, target: Target, hint: Hint | None = None
) -> KeyMismatchError:
    """The refusal of a state dict that does not fit; `hint` knows better what is to be done."""
    where = f"{document.name} ({state.path})" if state.selection else document.name
    found = cause(document, report, list(target.specs))
    what = f"does not match {target.name}: {found.what}"
    details = describe(report)
    return KeyMismatchError(report, what, where=where, hint=hint or found.hint, details=details)


def cause(document: Document, report: Report, order: Sequence[str] = ()) -> Cause:
    """The sentence that says it best, of a report of what does not fit.

    `order` has the keys of the target as they come.
    """
    without_bytes = [row for row in report.kind_mismatch if row.found.kind == META]
    if without_bytes:
        return _without_bytes(without_bytes)
    placeholders = [row for row in report.shape_mismatch if is_placeholder(row)]
    if placeholders:
        return _placeholders(placeholders)
    packed = [row.key for row in report.shape_mismatch if _is_packed(row)]
    packed += packed_weights({**dict.fromkeys(report.unexpected), **dict.fromkeys(report.missing)})
    if packed:
        return _packed(packed)
    if report.missing:
        counted = any(key.endswith(_COUNTED) for key in report.buffers)
        if len(report.buffers) == len(report.missing) and not counted:
            return _buffers(report.buffers)
        return _missing(document, report)
    if report.kind_mismatch:
        return _kinds(report.kind_mismatch)
    if report.shape_mismatch:
        return _shapes(report.shape_mismatch, document.name, order)
    if not report.matched:
        return Cause(report.refusals[0], Hint("see what it holds", _inspect_all(document.name)))
    return Cause(
        report.refusals[0],
        Hint(
            "build the model as it was trained (--init)",
            python="build the model as it was trained",
        ),
    )


# --- what no configuration of the model changes


def _without_bytes(rows: Sequence[Difference]) -> Cause:
    return Cause(
        f"saved while offloaded: {_tensors(rows)} no bytes",
        "save it again where all weights are in memory, not on the meta device",
    )


def is_placeholder(row: Difference) -> bool:
    """Whether an empty tensor stands where a model has a weight."""
    return row.found.shape == (0,) and row.wanted.numel > 0


def _placeholders(rows: Sequence[Difference]) -> Cause:
    return Cause(
        f"saved as placeholders: {_tensors(rows)} no elements, as DeepSpeed ZeRO-3 leaves them "
        "where the weights were not gathered",
        "gather the weights: run zero_to_fp32.py in the folder that training saved",
    )


def _is_packed(row: Difference) -> bool:
    """Whether bytes that hold several values each stand where a model has numbers."""
    dtype, wanted = row.found.dtype or "", row.wanted.dtype or ""
    is_whole = dtype.startswith(("int", "uint"))
    return is_whole and "float" in wanted and 0 < row.found.numel < row.wanted.numel


def _packed(keys: Sequence[str]) -> Cause:
    verb = "holds packed values" if len(keys) == 1 else "hold packed values"
    return Cause(
        f"saved quantized: {listed(keys)} {verb}, and no weights",
        "load it by the library that quantized it, or dequantize it there and save that",
    )


def _buffers(keys: Sequence[str]) -> Cause:
    return Cause(
        f"the file lacks {listed(keys)}, which the model computes itself",
        Hint(
            "load it with strict=False, which leaves those as they are", python="pass strict=False"
        ),
    )


_COUNTED = ("running_mean", "running_var")
"""Buffers that a model gathers while it is trained: to begin with others is to lose them."""


def _kinds(rows: Sequence[Difference]) -> Cause:
    first = rows[0]
    found, wanted = kinds_of(first)
    verb = "is" if len(rows) == 1 else f"and {len(rows) - 1} more are"
    return Cause(
        f"{first.key} {verb} {found}, where the model has it {wanted}: "
        "torch does not copy one into the other",
        _WRITABLE
        if wanted == EXPANDED
        else _DENSE.get(found.partition(" ")[0].partition("_")[0], _REBUILD),
    )


_WRITABLE = "make it x.contiguous() in the model: torch writes to nothing that repeats its elements"
_REBUILD = "build the model as it was when it was saved"
_DENSE = {
    "sparse": "save x.to_dense() of it in torch first",
    "quantized": "save x.dequantize() of it in torch first, or quantize the model as it was",
    "nested": "save x.to_padded_tensor(0.0) of it in torch first",
    "torch.distributed": "save x.full_tensor() of it where it was trained",
}


def _tensors(rows: Sequence[Difference]) -> str:
    verb = "has" if len(rows) == 1 else "have"
    return f"{listed(row.key for row in rows)} {verb}"


# --- what is missing


def _missing(document: Document, report: Report) -> Cause:
    what = f"the file lacks {listed(report.missing)}"
    if not report.matched and not report.shape_mismatch:
        what = "nothing matches: is this the right model?"
    return Cause(what, Hint("see what it holds", _inspect_all(document.name)))


def _inspect_all(name: str) -> Command:
    return command("inspect", name, all=True)


def _shapes(rows: Sequence[Difference], name: str, order: Sequence[str]) -> Cause:
    others = [row for row in rows if row.found.shape is None]
    if others:
        return _no_tensors(others, name)
    if all(row.is_buffer for row in rows):
        return _resolution(rows)
    sizes = _only_sizes(rows)
    says = any(_says(row.key, (*_POSITIONS, *_VOCABULARIES)) for row in rows)
    if sizes is not None and not says and not _is_head(rows, order):
        sizes = None
    shown = f"{rows[0].key} {shape(rows[0].found)} vs {shape(rows[0].wanted)}"
    if all(map(is_transposed, rows)):
        what = f"{plural(len(rows), 'weight')} {'is' if len(rows) == 1 else 'are'} transposed"
        return Cause(
            f"{what}, and square ones may be, which does not show: {shown}",
            Hint(
                "turn all weights of those layers where they were saved (a Conv1D, TensorFlow, "
                "PaddlePaddle keep them so); see",
                _inspect_all(name),
            ),
        )
    if sizes is None:
        differ = "a shape differs" if len(rows) == 1 else f"{len(rows)} shapes differ, the first"
        hint = Hint(
            "build the model as it was trained (--init); see",
            _inspect_all(name),
            python="build the model as it was trained; see",
        )
        return Cause(f"{differ}: {shown}", hint)
    found, _ = sizes
    if any(_says(row.key, _POSITIONS) for row in rows):
        return Cause(
            f"only the position embedding differs: {shown}",
            _building(f"for {found} positions", f", or interpolate {rows[0].key}"),
        )
    if any(_says(row.key, _VOCABULARIES) for row in rows):
        return Cause(
            f"only the vocabulary differs: {shown}",
            _building(f"with a vocabulary of {found}", ", load it, then resize it"),
        )
    head = rows[0].key.rpartition(".")[0] or rows[0].key
    return Cause(
        f"only the classifier head differs: {shown}",
        _building(f"with {found} classes", f", load it, then replace {head!r}"),
    )


def _no_tensors(rows: Sequence[Difference], name: str) -> Cause:
    verb, noun = ("is", "a tensor") if len(rows) == 1 else ("are", "tensors")
    return Cause(
        f"{listed(row.key for row in rows)} {verb} no {noun.removeprefix('a ')} in the file, where "
        f"the model has {noun}",
        Hint("see what it holds", _inspect_all(name)),
    )


def _is_head(rows: Sequence[Difference], order: Sequence[str]) -> bool:
    """Whether what differs is a head by its name, or by its place: no layer comes after it."""
    if any(_says(row.key, _HEADS) for row in rows):
        return True
    keys = {row.key for row in rows}
    last = max((at for at, key in enumerate(order) if key in keys), default=len(order))
    return any(_says(row.key, _PERHAPS) for row in rows) and last + 1 >= len(order)


def _resolution(rows: Sequence[Difference]) -> Cause:
    """Buffers alone differ: masks and indices for another size of image, window or text."""
    first, verb = rows[0], "differs" if len(rows) == 1 else "differ"
    others = "" if len(rows) == 1 else f" and {len(rows) - 1} more"
    return Cause(
        f"only what the model computes for its resolution {verb}: "
        f"{first.key} {shape(first.found)} vs {shape(first.wanted)}{others}",
        _building(
            "for the resolution, window or length that it was trained with",
            ", or leave these keys out and load the rest with strict=False",
        ),
    )


def _building(how: str, then: str) -> Hint:
    """The hint to build another model; on the command line `--init` says how."""
    return Hint(f"build the model {how} (--init){then}", python=f"build the model {how}{then}")


_POSITIONS = ("pos", "wpe")
_HEADS = ("head", "class", "cls", "logit", "pred", "score")
"""What heads are called."""
_PERHAPS = ("bias", "fc", "out", "last", "linear")
"""What heads are called, and other layers; one with a bias may be one, a table of queries not."""
_VOCABULARIES = ("emb", "wte", "vocab", "tok", "lm")


_OF_LAYERS = ("weight", "bias")
"""What the parameters of a head are called, and those of an embedding."""


def _says(key: str, words: tuple[str, ...]) -> bool:
    """Whether a word of a key begins with one of `words`."""
    return any(word.startswith(words) for word in re.split("[._]", key.lower()))


def _only_sizes(rows: Sequence[Difference]) -> tuple[int, int] | None:
    """The one pair of sizes in which all shapes differ, each in one dimension; else None.

    That is the first dimension, where what a layer gives is counted; of positions, any.
    """
    pairs = set()
    for row in rows:
        found, wanted = row.found.shape or (), row.wanted.shape or ()
        pairs_of = enumerate(zip(found, wanted, strict=False))
        unlike = [index for index, (one, other) in pairs_of if one != other]
        if len(found) != len(wanted) or len(unlike) != 1:
            return None
        if unlike[0] and not _says(row.key, _POSITIONS):
            return None
        pairs.add((found[unlike[0]], wanted[unlike[0]]))
    if any(
        row.is_buffer or row.key.rpartition(".")[2] not in _OF_LAYERS for row in rows
    ) and not all(_says(row.key, _POSITIONS) for row in rows):
        return None
    modules = {prefix_of(row.key) for row in rows}
    layers = {prefix_of(row.key) for row in rows if len(row.found.shape or ()) > 1}
    return pairs.pop() if modules == layers and len(pairs) == 1 else None  # no norm is among them
