"""The one judge of what loads into a target: a match is what torch's strict load takes.

Keys, shapes and kinds of tensors are held against those of the target. Where the target is a model
that has code of its own for loading, the model is asked.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ckptfix.contents.specs import specs
from ckptfix.contents.tensors import as_tensor, without_disguise
from ckptfix.diffs.values import Side, same_values
from ckptfix.formats.table import SAFETENSORS
from ckptfix.layouts import in_pieces
from ckptfix.report import ANYTHING, LAZY, QUANTIZED, Difference, Report, Spec
from ckptfix.tree.document import OrderedMap
from ckptfix.tree.dtypes import cast_loss, is_copied

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.target import Target
    from ckptfix.torch_bridge.trial import Verdict
    from ckptfix.tree.document import Document


def compare(
    found: Mapping[str, Spec],
    wanted: Mapping[str, Spec],
    buffers: Collection[str] = (),
    empty: tuple[str, ...] = (),
) -> Report:
    """Hold what a state dict has against what a target wants, as torch's strict load does.

    `buffers` are the keys of the target that are no parameters; `empty` is how keys begin that
    belong where the target has None for a module.
    """
    common = [key for key in found if key in wanted]
    unlike = [
        Difference(key, found[key], wanted[key], key in buffers)
        for key in common
        if key.rpartition(".")[2] != "_extra_state"  # a module takes it, whatever it is
    ]
    kinds = [row for row in unlike if not _is_taken(row.found, row.wanted)]
    refused = {row.key for row in kinds}
    shapes = [row for row in unlike if row.key not in refused and not _fits(row.found, row.wanted)]
    refused.update(row.key for row in shapes)
    matched = [key for key in common if key not in refused]
    missing = [key for key in wanted if key not in found]
    kept = [key for key in missing if key in buffers]
    casts = [
        Difference(key, found[key], wanted[key]) for key in matched if _casts(key, found, wanted)
    ]
    losses = {row.key: cast_loss(row.found.dtype or "", row.wanted.dtype or "") for row in casts}
    surplus = [key for key in found if key not in wanted]
    return Report(
        matched,
        missing,
        [key for key in surplus if not key.startswith(empty)],
        shapes,
        casts,
        _numel(wanted, wanted),
        _numel(wanted, {*missing, *refused}.difference(buffers)),
        kinds,
        kept,
        absent_numel=_numel(wanted, (*missing, *refused)),
        ignored=[key for key in surplus if key.startswith(empty)],
        altered={key: what for key, what in losses.items() if what},
    )


def _numel(specs: Mapping[str, Spec], keys: Iterable[str]) -> int:
    return sum(specs[key].numel for key in keys if key in specs)


def _is_taken(found: Spec, wanted: Spec) -> bool:
    """Whether torch copies a tensor of one kind into one of another; a shape is not looked at."""
    if wanted == ANYTHING:
        return True
    if wanted.kind == LAZY:
        return found.kind in ("", LAZY)
    if wanted.kind in _QUANTIZED:
        return wanted.dtype in _WHOLE and _is_requantized(found, wanted)
    if found.kind or wanted.kind:
        return found.kind == wanted.kind
    return found.dtype is None or wanted.dtype is None or is_copied(found.dtype, wanted.dtype)


def _is_requantized(found: Spec, wanted: Spec) -> bool:
    if found.kind:
        return (found.kind, found.dtype) == (wanted.kind, wanted.dtype)
    return wanted.kind != _QUANTIZED[-1] and found.dtype in ("float32", None)


_QUANTIZED = tuple(QUANTIZED.values())
_WHOLE = ("qint8", "quint8", "qint32")
"""Dtypes of quantized tensors that torch copies; it has no copy of those with several in a byte."""


def _fits(found: Spec, wanted: Spec) -> bool:
    if wanted.shape is None:
        return not wanted.kind or found.shape is not None or found.kind == wanted.kind
    if found.shape is None:
        return False
    from_old_torch = not wanted.shape and found.shape == (1,)  # torch 0.3 had no 0-d tensors
    return found.shape == wanted.shape or from_old_torch


def _casts(key: str, found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> bool:
    return found[key].dtype not in (None, wanted[key].dtype) and bool(wanted[key].dtype)


# --- a state dict


def as_it_stands(
    document: Document, state: StateDict, wanted: Target, renaming: Renaming | None = None
) -> Report:
    """Whether the strict load takes a state dict as torch, or safetensors, gives it to a program.

    With a renaming, once its keys are renamed and nothing else is done.
    """
    lacking = written_once(document, state)
    new = renaming.keys if renaming is not None else {key: key for key in state.mapping}
    mapping = OrderedMap(
        (new[key], node) for key, node in state.mapping.items() if key not in lacking
    )
    if state.metadata is not None:
        versions = state.metadata if renaming is None else renaming.metadata(state.metadata)
        mapping.attributes = {"_metadata": OrderedMap(versions)}
    made = _Judge(document, state, wanted).of(mapping, specs(mapping))
    if state.made and made.fits:
        return replace(made, refusals=[f"it has to be put together: {state.made[0].found}"])
    if document.container == in_pieces.RANKS and made.fits:
        return replace(made, refusals=["its tensors are in pieces, which torch does not join"])
    return made


def once_repaired(
    document: Document, state: StateDict, wanted: Target, renaming: Renaming
) -> tuple[Report, dict[str, str]]:
    """The same once it is renamed and repaired, and the ties that were made for that.

    A key that is missing and tied to one that is there is another name of it. What is unexpected is
    left out then, and does not count.
    """
    judge, mapping = _Judge(document, state, wanted), renamed(state, renaming)
    made = judge.of(mapping, specs(mapping, repaired=True))
    tied = _ties_to_make(made.missing, wanted.ties, mapping)
    if tied:
        mapping.update({key: mapping[other] for key, other in tied.items()})
        made = judge.of(mapping, specs(mapping, repaired=True))
    if wanted.model is not None and made.unexpected:
        made = judge.without(made.unexpected, mapping, made)
    if mapping and made.fits and not made.matched:
        made = replace(made, refusals=["nothing matches: is this the right model?"])
    return made, tied


def renamed(state: StateDict, renaming: Renaming) -> OrderedMap:
    """A state dict under its new keys, with the tensors that numpy arrays hold."""
    new = renaming.keys
    made = OrderedMap(
        (new[key], without_disguise(node)) for key, node in state.mapping.items() if key in new
    )
    if state.metadata is not None:
        made.attributes = {"_metadata": OrderedMap(renaming.metadata(state.metadata))}
    return made


def written_once(document: Document, state: StateDict) -> dict[str, str]:
    """Keys that a safetensors file has in its header alone, each with the one that it names.

    `safetensors.torch.load_model` knows of them, `load_file` does not.
    """
    if SAFETENSORS.name not in document.container:
        return {}
    stored = ((key, tensor.storage.key) for key, tensor in state.tensors.items())
    return {key: kept for key, kept in stored if key != kept and kept in state.mapping}


def _ties_to_make(
    missing: Iterable[str], ties: Iterable[tuple[str, ...]], there: Collection[str]
) -> dict[str, str]:
    """Missing keys, each with one that names the same tensor of the target, and is there."""
    group_of = {key: group for group in ties for key in group}
    others = {key: [one for one in group_of.get(key, ()) if one in there] for key in missing}
    return {key: found[0] for key, found in others.items() if found}


class _Judge:
    """Judges state dicts of one document for one target."""

    def __init__(self, document: Document, state: StateDict, wanted: Target) -> None:
        self._document = document
        self._wanted = wanted
        self._specs = wanted.specs_for(state)

    def of(self, mapping: OrderedMap, found: Mapping[str, Spec]) -> Report:
        """The verdict over a state dict."""
        listed = compare(found, self._specs, self._wanted.buffers, self._wanted.empty)
        if self._wanted.model is not None:
            listed = self._asked(mapping, listed)
        tied = _ties_to_make(listed.missing, self._wanted.ties, mapping)
        if tied:  # they get the values of the key that is there
            tied_numel = _numel(self._specs, set(tied).difference(listed.buffers))
            listed = replace(listed, random_numel=listed.random_numel - tied_numel)
        if listed.fits:
            listed = replace(listed, refusals=list(self._torn(mapping)))
        return self._with_filled(listed, mapping)

    def _with_filled(self, listed: Report, mapping: OrderedMap) -> Report:
        """The report, whose matches are in the file: a counter that BatchNorm makes is not."""
        told = {*mapping, *listed.missing, *listed.forgiven}
        filled = [key for key in self._wanted.counters if key not in told]
        if not filled:
            return listed
        matched = [key for key in listed.matched if key not in set(filled)]
        return replace(listed, matched=matched, filled=filled)

    def without(self, keys: Iterable[str], mapping: OrderedMap, made: Report) -> Report:
        """The verdict once unexpected keys are left out, which are still named."""
        left = OrderedMap((k, node) for k, node in mapping.items() if k not in set(keys))
        left.attributes = mapping.attributes
        again = self.of(left, specs(left, repaired=True))
        if again.unexpected:
            what = f"the model's loader makes {again.unexpected[0]!r} of it, which it does not have"
            again = replace(again, refusals=[*again.refusals, what])
        return replace(again, unexpected=made.unexpected)

    def _asked(self, mapping: OrderedMap, listed: Report) -> Report:
        """What the model itself says, put into the words of lists where they have some."""
        from ckptfix.torch_bridge import trial

        assert self._wanted.model is not None
        said = trial.strict_load(
            self._wanted.model,
            mapping,
            self._document.byteorder,
            explained=bool(listed.shape_mismatch or listed.kind_mismatch),
            real=self._wanted.real,
        )
        if not said.ended:
            return replace(listed, refusals=[said.refusal])
        if not said.refusal and self._took_nothing(said, mapping):
            what = "the model's own loader takes nothing of it"
            return replace(listed, refusals=[what]) if listed.loads else listed
        return self._as_report(said, listed, mapping)

    def _took_nothing(self, said: Verdict, mapping: OrderedMap) -> bool:
        """Whether a model that takes anything took nothing of a file that holds something."""
        if said.grown or not mapping:
            return False
        if said.is_idle or set(mapping) <= set(said.unexpected):
            return True
        return bool(self._specs) and set(self._specs) <= set(said.missing)

    def _as_report(self, said: Verdict, listed: Report, mapping: OrderedMap) -> Report:
        loads = not said.refusal
        missing = [key for key in said.missing if key in self._wanted.specs]
        shapes = [] if loads else [row for row in listed.shape_mismatch if row.key in said.refusal]
        refused = {row.key for row in (*shapes, *listed.kind_mismatch)}
        unlike = {*missing, *refused, *said.unexpected}
        matched = [
            *(key for key in self._specs if key not in unlike),
            *(said.grown if loads else ()),
        ]
        if loads and not matched:  # it keeps what it takes where no key tells
            matched = [key for key in mapping if key not in unlike]
        explained = missing or said.unexpected or refused
        return replace(
            listed,
            matched=matched,
            missing=[] if loads else missing,
            forgiven=missing if loads else [],
            unexpected=[] if loads else said.unexpected,
            shape_mismatch=shapes,
            random_numel=_numel(self._specs, {*missing, *refused}.difference(self._wanted.buffers)),
            absent_numel=_numel(self._specs, {*missing, *refused}),
            buffers=[key for key in missing if key in self._wanted.buffers],
            refusals=[] if loads or explained else _lines(said.refusal),
        )

    def _torn(self, mapping: OrderedMap) -> Iterator[str]:
        """Different tensors for one tensor of the target: the one loaded last would stay."""
        for keys in self._wanted.ties:
            tensors = ((key, as_tensor(mapping.get(key))) for key in keys)
            sides = {key: Side(found, self._document.byteorder) for key, found in tensors if found}
            for first, second in pairwise(sides):
                if not same_values(sides[first], sides[second]):
                    yield (
                        f"{first!r} and {second!r} are one tensor of {self._wanted.name}, "
                        "and two different ones in the file"
                    )
        if self._wanted.overlaps:
            yield from self._overwritten(mapping)

    def _overwritten(self, mapping: OrderedMap) -> Iterator[str]:
        """Tensors of the target that share memory, and would not both have what the file has."""
        from ckptfix.torch_bridge import overlaps

        tensors = {key: found for key, node in mapping.items() if (found := as_tensor(node))}
        for overlap in self._wanted.overlaps:
            for first, second in overlaps.overwritten(overlap, tensors, self._document.byteorder):
                yield (
                    f"{first!r} and {second!r} share memory in {self._wanted.name}, "
                    "and the file has different values for it"
                )


def _lines(refusal: str) -> list[str]:
    """What torch lists under its heading; or all that was said."""
    return [line.strip() for line in refusal.splitlines()[1:] if line.strip()] or [refusal]
