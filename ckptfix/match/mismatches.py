"""Why a checkpoint does not fit a target, in one sentence: what differs, and what to do about it.

A head for another number of classes, another vocabulary, other positions, a buffer too many and
the wrong model altogether look alike in a list of keys; people need to tell them apart.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import KeyMismatchError
from ckptfix.hints import Command, Hint, command
from ckptfix.keys.renaming import prefix_of
from ckptfix.match.transposes import is_transposed
from ckptfix.report import describe, shape
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.report import Difference, Report
    from ckptfix.tree.document import Document


class Cause(NamedTuple):
    """What differs, and what to do about it."""

    what: str
    hint: Hint


def error(
    document: Document, state: StateDict, report: Report, wanted: str, hint: Hint | None = None
) -> KeyMismatchError:
    """The refusal of a state dict that does not fit; `hint` knows better what is to be done."""
    where = f"{document.name} ({state.path})" if state.selection else document.name
    found = cause(document, report)
    what = f"does not match {wanted}: {found.what}"
    details, hint = describe(report), hint or found.hint
    return KeyMismatchError(report, what, where=where, hint=hint, details=details)


def cause(document: Document, report: Report) -> Cause:
    """The sentence that says it best, of a report with missing keys or other shapes."""
    if report.missing:
        return _missing(document, report)
    return _shapes(report.shape_mismatch, document.name)


def _missing(document: Document, report: Report) -> Cause:
    what = f"the file lacks {listed(report.missing)}"
    if not report.matched and not report.shape_mismatch:
        what = "nothing matches: is this the right model?"
    return Cause(what, Hint("see what it holds", _inspect_all(document.name)))


def _inspect_all(name: str) -> Command:
    return command("inspect", name, all=True)


def _shapes(rows: Sequence[Difference], name: str) -> Cause:
    sizes = _only_sizes(rows)
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


def _building(how: str, then: str) -> Hint:
    """The hint to build another model; on the command line `--init` says how."""
    return Hint(f"build the model {how} (--init){then}", python=f"build the model {how}{then}")


_POSITIONS = ("pos", "wpe")
_VOCABULARIES = ("emb", "wte", "vocab", "tok", "lm")


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
    modules = {prefix_of(row.key) for row in rows}
    layers = {prefix_of(row.key) for row in rows if len(row.found.shape or ()) > 1}
    return pairs.pop() if modules == layers and len(pairs) == 1 else None  # no norm is among them
