"""Targets: what keys are held against. A model, another checkpoint, or a list of keys.

How a model is built that is named on the command line is told in `building`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckptfix import door
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import FileSource
from ckptfix.contents.specs import specs
from ckptfix.contents.state_dicts import choose
from ckptfix.errors import CkptfixError, ReadError, SelectionError, TargetError
from ckptfix.hints import Hint, command
from ckptfix.match import building
from ckptfix.report import ANYTHING, EXPANDED, LAZY, META, QUANTIZED, Spec
from ckptfix.words import listed

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import nn

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.findings import Finding
    from ckptfix.torch_bridge.overlaps import Overlap
    from ckptfix.tree.document import Document


@dataclass(frozen=True, slots=True)
class Target:
    """What a state dict is held against: its keys in order, and what to call it."""

    name: str
    specs: Mapping[str, Spec]
    ties: tuple[tuple[str, ...], ...] = ()
    """Groups of keys that name one tensor, where the target knows."""
    buffers: frozenset[str] = frozenset()
    """Keys that are no parameters: what the model computes, or keeps count of."""
    model: nn.Module | None = None
    """The model itself, where it has code of its own that decides what it takes."""
    real: Callable[[], nn.Module] | None = None
    """What builds that model with values, where it is on the meta device."""
    overlaps: tuple[Overlap, ...] = ()
    """Tensors of a model that share memory without being one."""
    empty: tuple[str, ...] = ()
    """What keys begin with that belong where a model has None for a module."""
    notes: tuple[Finding, ...] = ()
    """What was noticed while it was read, where it is a checkpoint."""
    in_order: bool = False
    """Whether its keys are known to be in the order of its modules, as those of a model are."""

    def specs_for(self, state: StateDict) -> Mapping[str, Spec]:
        """`specs`, but for counters that BatchNorm gives to state dicts from before torch 0.4.1.

        Those have none, and no module of version 2. Source: `_NormBase._load_from_state_dict`.
        """
        versions = [entry.get("version") for entry in _dicts(state.metadata or {})]
        if any(type(version) is int and version > 1 for version in versions):
            return self.specs
        if any(key.endswith(_COUNTER) for key in state.mapping):
            return self.specs
        return {key: spec for key, spec in self.specs.items() if not key.endswith(_COUNTER)}

    @property
    def counters(self) -> list[str]:
        """The counters of BatchNorm, which torch before 0.4.1 did not have."""
        return [key for key in self.specs if key.endswith(_COUNTER)]


_EXTRA = "_extra_state"
_COUNTER = "num_batches_tracked"


def _dicts(mapping: Mapping[str, Any]) -> list[dict[Any, Any]]:
    return [value for value in mapping.values() if isinstance(value, dict)]


def of_module(module: nn.Module, name: str | None = None) -> Target:
    """The target that a model is, wherever it lives."""
    from ckptfix.torch_bridge import overlaps, trial

    state = _state_of(module)
    deaf = trial.extra_states_not_taken(module)
    found = {key: _spec(key, value) for key, value in state.items() if key not in deaf}
    named = module.named_buffers(remove_duplicate=False)
    buffers = frozenset(key for key, _ in named if key in found)
    model = module if trial.decides(module) else None
    return Target(
        name or type(module).__name__,
        found,
        overlaps.ties(state),
        buffers,
        model,
        overlaps=overlaps.of(state),
        empty=_empty(module),
        in_order=True,
    )


def _state_of(module: nn.Module) -> dict[str, Any]:
    """Its state dict, with its own parameters; an override may know no options."""
    try:
        return module.state_dict(keep_vars=True)
    except TypeError:
        return module.state_dict()


def _empty(module: nn.Module) -> tuple[str, ...]:
    """How keys begin that torch passes over, since a module that was there is None."""
    return tuple(
        f"{name}.{child}." if name else f"{child}."
        for name, parent in module.named_modules(remove_duplicate=False)
        for child, found in parent._modules.items()
        if found is None
    )


def _spec(key: str, value: Any) -> Spec:
    """What a model wants under a key."""
    import torch
    from torch.nn.parameter import is_lazy
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    from ckptfix.torch_bridge import overlaps

    if is_lazy(value):
        return Spec(None, None, LAZY)
    if not isinstance(value, torch.Tensor) or key.endswith(_EXTRA):
        return ANYTHING
    kind = "" if value.layout is torch.strided else str(value.layout).removeprefix("torch.")
    if value.is_quantized:
        kind = QUANTIZED[str(value.qscheme()).removeprefix("torch.")]
    if value.is_nested:
        return Spec(None, str(value.dtype).removeprefix("torch."), "nested")
    is_wrapper: bool = is_traceable_wrapper_subclass(value)
    if is_wrapper:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if not kind and overlaps.repeats(value):
        kind = EXPANDED
    return Spec(tuple(value.shape), str(value.dtype).removeprefix("torch."), kind)


def of_document(document: Document, select: str | None = None) -> Target:
    """The target that another checkpoint is."""
    state = choose(document, select)
    ties = tuple(map(tuple, state.ties))
    wanted = {
        key: _wanted(key, found) for key, found in specs(state.mapping, repaired=True).items()
    }
    buffers = frozenset(filter(_is_computed, wanted))
    return Target(document.name, wanted, ties, buffers, notes=document.notes)


def _wanted(key: str, found: Spec) -> Spec:
    """What a model wants that has this in its state dict."""
    if key.endswith(_EXTRA):
        return ANYTHING
    return found._replace(kind="") if found.kind == META else found


def _is_computed(key: str) -> bool:
    """Whether a key is called as buffers are that a model computes; a file does not tell."""
    return key.rpartition(".")[2] in _COMPUTED


_COMPUTED = (
    "num_batches_tracked", "position_ids", "token_type_ids", "relative_position_index",
    "relative_coords_table", "attn_mask", "inv_freq",
)  # fmt: skip


def of_file(path: str | os.PathLike[str]) -> Target:
    """The target in a file: a checkpoint, or the JSON of `ckptfix inspect --json`."""
    keys = _listed_keys(Place(path))
    if keys is not None:
        return Target(str(path), keys, buffers=frozenset(filter(_is_computed, keys)))
    try:
        return of_document(door.read(path))
    except SelectionError as error:
        take = command("convert", str(path), "OUT", select="PATH")
        raise TargetError(
            f"cannot compare with {error.message}", hint=Hint("take one out of it first", take)
        ) from None
    except CkptfixError as error:
        raise TargetError(f"cannot compare with {error.message}", hint=error.hint) from None


def _plain(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The state dicts of a model, averages only where there is nothing else."""
    found = [state for state in states if state["role"] != "optimizer"]
    return [state for state in found if state["role"] not in ("ema", "swa")] or found


def _listed_keys(place: Place) -> dict[str, Spec] | None:
    """Keys of a JSON report; None where the file is no such report."""
    try:
        source = FileSource(place.name)  # no listing has a journal; the door says what it undid
        if not source.head(64).lstrip().startswith(b"{"):
            return None
        listings = _answers(source.read(0, source.size).decode())
        if len(listings) > 1:
            names = listed([str(one["input"]) for one in listings])
            raise TargetError(
                f"lists {len(listings)} files: {names}",
                where=place,
                hint=Hint("inspect the one that is meant", command("inspect", "FILE", json=True)),
            )
        listing = listings[0]
        states = [(state["path"], _listed_specs(state)) for state in _plain(listing["state_dicts"])]
    except (ReadError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if len(states) != 1:
        paths = listed([str(where) for where, _ in states])
        raise TargetError(
            f"lists {len(states)} state dicts: {paths or 'none'}",
            where=place,
            hint=Hint(
                "inspect a file that holds the one that is meant",
                command("inspect", "FILE", json=True),
            ),
        )
    return states[0][1]


def _answers(text: str) -> list[Any]:
    """The answers in a text: one on each line, or one that someone indented."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _listed_specs(state: dict[str, Any]) -> dict[str, Spec]:
    tensors = {row["key"]: Spec(tuple(row["shape"]), row["dtype"]) for row in state["tensors"]}
    return tensors | {key: Spec(None, None) for key in state["others"]}


def of_reference(
    reference: str, init: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Target:
    """The model that `FILE.py:NAME`, `package.module:NAME` or `hf:FOLDER` names.

    See `building.of_reference`. It is built on the meta device, where it takes no memory. A model
    whose code wants values is built on the CPU instead, and `say` is told so first. Raises
    `TargetError`.
    """
    build = building.of_reference(reference, init)
    try:
        target = of_module(build("meta"), reference)
    except building.WantsValuesError as error:
        why = f"where there are no values, its code failed ({error.__cause__})"
        say(f"{reference} is built on the CPU: {why}".splitlines()[0])
        return of_module(build("cpu"), reference)
    return target if target.model is None else replace(target, real=lambda: build("cpu"))
