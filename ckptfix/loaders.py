"""Checkpoints loaded into programs: state dicts with torch tensors, keyed as a model expects them.

Nothing here prints, and nothing from the file is run.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptfix import door
from ckptfix.contents.specs import spec
from ckptfix.contents.state_dicts import choose
from ckptfix.contents.tensors import is_special_tensor, special_class
from ckptfix.diagnose import damage
from ckptfix.edit import averages, edits
from ckptfix.errors import UnsupportedError
from ckptfix.formats import embedded
from ckptfix.keys import globs, wrappers
from ckptfix.match import mismatches
from ckptfix.match import target as targets
from ckptfix.match.choose import match
from ckptfix.report import META
from ckptfix.torch_bridge import materialize, trial
from ckptfix.tree.document import Inert
from ckptfix.words import listed

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.choose import Match
    from ckptfix.report import Report
    from ckptfix.torch_bridge.materialize import MapLocation
    from ckptfix.tree.document import Document, Node


def load(
    path: str | os.PathLike[str], *, map_location: MapLocation = "cpu", verify: bool = False
) -> Any:
    """Everything in a checkpoint, as `torch.load` gives it, without running anything from the file.

    Tensors have the shapes, strides, dtypes and sharing that were saved; they lie over a private
    memory map of the file until they are written to. Objects of unknown classes come back inert
    (`Inert`).

    Args:
        path: a file in any container that ckptfix reads.
        map_location: where tensors go: a device, a mapping of saved tags to devices, or a
            callable, as in `torch.load`; `"auto"` is the visible GPU with the most free memory,
            the CPU if there is none.
        verify: whether to read every byte first and hold it against the checksums on record, which
            takes as long as reading the file; `torch.load` never does. Names, shapes and the bounds
            of each tensor are always checked.

    Raises:
        ReadError: the file is not a checkpoint, is damaged, unsafe or unsupported.
    """
    document = door.read(path)
    if verify:
        damage.check_tensors(document, document.root)
    return materialize.tree(document.root, _materializer(document, map_location))


def load_state_dict(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    select: str | None = None,
    average: bool = False,
    drop: str | Sequence[str] = (),
    strict: bool = True,
    map_location: MapLocation = "cpu",
    verify: bool = False,
) -> OrderedDict[str, Tensor]:
    """The state dict in a checkpoint, keyed as `model` expects it.

    The state dict that fits is found, prefixes are stripped, added or exchanged as the model wants
    them, the part of a larger model that is meant is taken out, and a tie that was not saved is
    made: as `ckptfix fix` does it. What the model does not have is left out, and a `UserWarning`
    names it. Without a model the keys stay as they are saved. `_metadata` comes along.

    Args:
        path: a file in any container that ckptfix reads.
        model: what the keys have to fit; it is not changed. Where it has code of its own for
            loading, that code is run, and all that the model holds is put back: tensors,
            attributes, lists, dicts, sets. What such code writes elsewhere stays.
        select: the path of the state dict inside the checkpoint, where it holds several.
        average: whether to take the averages of the weights (EMA, SWA) instead of the weights.
        drop: keys to leave out, by a pattern of the whole key, such as `*lora_*`, or several.
        strict: whether every key and shape of the model has to be there; otherwise the nearest
            names are taken.
        map_location: as in `load`.
        verify: as in `load`, for the bytes of this state dict.

    Raises:
        ReadError: the file cannot be read, or with `verify`, a byte of it has changed.
        SelectionError: there is no state dict, or more than one could be meant.
        RenameError: the keys fit, or come nearest, in two ways.
        UnsupportedError: it holds a tensor without bytes, or one of a class of its own.
        KeyMismatchError: with `strict`, the keys or shapes do not fit; carries the `Report`.
    """
    document, select = embedded.taken(door.read(path), select)
    if average:
        document, select, _ = averages.take(document, select)
    if model is None:
        mapping = choose(document, select).mapping
        gone = globs.matching(mapping, _patterns(drop), document.name)
        kept = edits.mapping_without(mapping, gone) if gone else mapping
        return _loaded(document, kept, map_location, verify)
    found = match(
        document, targets.of_module(model), select, partly=not strict, drop=_patterns(drop)
    )
    if found.unused:
        warnings.warn(_left_out(document, model, found), stacklevel=2)
    if found.report.changes:
        warnings.warn(_changes(document, found), stacklevel=2)
    return _loaded(document, found.mapping(), map_location, verify)


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    select: str | None = None,
    average: bool = False,
    drop: str | Sequence[str] = (),
    strict: bool = True,
    verify: bool = False,
) -> Report:
    """Load a checkpoint into a model, wherever the model's parameters live.

    Args:
        model: the module to load into; unchanged where this raises.
        path: a file in any container that ckptfix reads.
        select: the path of the state dict inside the checkpoint, where it holds several.
        average: whether to take the averages of the weights (EMA, SWA) instead of the weights.
        drop: keys to leave out, by a pattern of the whole key, such as `*lora_*`, or several.
        strict: whether every key of the model has to be there. Shapes have to match where keys do,
            as in torch.
        verify: as in `load`, for the bytes that are loaded, before the model is touched.

    Returns:
        How the keys compared. `unexpected` are those that the model does not have and that were
        left out, as `ckptfix fix` leaves them out; `passed_over` tells of averages that fit as
        well. `loads` is True where the model got all that it wants. With `strict=False`, `missing`
        are the keys that kept their values.

    Raises:
        KeyMismatchError: the keys or shapes do not fit; carries the `Report`, and prints as a list.
        ReadError, SelectionError, RenameError, UnsupportedError: as in `load_state_dict`.
    """
    document, select = embedded.taken(door.read(path), select)
    if average:
        document, select, _ = averages.take(document, select)
    wanted = targets.of_module(model)
    found = match(document, wanted, select, partly=not strict, drop=_patterns(drop))
    if found.report.refused:
        raise mismatches.error(document, found.state, found.report, wanted)
    if found.report.changes:
        warnings.warn(_changes(document, found), stacklevel=2)
    loaded = _loaded(document, found.mapping(), "cpu", verify)
    try:
        trial.load(model, loaded, strict=strict)
    except Exception as error:
        report = replace(found.report, refusals=[f"{type(error).__name__}: {error}"])
        raise mismatches.error(document, found.state, report, wanted) from error
    return replace(found.report, left_out=True)


def _patterns(drop: str | Sequence[str]) -> Sequence[str]:
    return [drop] if isinstance(drop, str) else drop


def _left_out(document: Document, model: nn.Module, found: Match) -> str:
    kind = type(model).__name__
    return f"{document.name}: left out what {kind} does not have: {listed(found.unused)}"


def _changes(document: Document, found: Match) -> str:
    return f"{document.name}: values change as torch loads them: {listed(found.report.changes)}"


def _materializer(document: Document, map_location: MapLocation) -> materialize.Materializer:
    place = materialize.placement(map_location)
    return materialize.Materializer(place, document.byteorder)


def _loaded(
    document: Document, mapping: dict[str, Node], map_location: MapLocation, verify: bool
) -> OrderedDict[str, Any]:
    kinds = {key: kind for key, node in mapping.items() if (kind := _kind(node))}
    for key, kind in kinds.items():
        if kind == META:
            raise UnsupportedError(
                f"{key!r} has no bytes: it was saved while it was offloaded",
                where=document.name,
                hint="save it again where all weights are in memory, not on the meta device",
            )
    if verify:
        damage.check_tensors(document, mapping)
    made = materialize.tree(mapping, _materializer(document, map_location))
    for key, kind in kinds.items():
        if isinstance(made[key], Inert):
            raise UnsupportedError(
                f"{key!r} is a tensor of another kind: {kind}",
                where=document.name,
                hint="load it with torch.load, and give that to ckptfix.strip_prefix",
            )
    return made if isinstance(made, OrderedDict) else OrderedDict(made)


def _kind(node: Node) -> str:
    """What a tensor is that is not dense; empty for a dense one, and for what is none."""
    found = spec(node, repaired=True).kind
    if not found and isinstance(node, Inert) and is_special_tensor(node):
        return special_class(node)
    return found


# --- plain dicts


def strip_prefix(
    state_dict: Mapping[str, Any], prefix: str | None = None, *, partial: bool = False
) -> OrderedDict[str, Any]:
    """A state dict without wrapper components, or without the prefix that is named.

    The values are the same objects; `state_dict` is not changed. `_metadata` is renamed with the
    keys.

    Args:
        state_dict: what `torch.load` or `nn.Module.state_dict` gave.
        prefix: such as `module.`; None removes what wrappers (DataParallel, torch.compile, FSDP,
            …) added.
        partial: whether to strip the keys that have the prefix even where others do not.

    Raises:
        PartialPrefixError: only some keys carry `prefix`.
        KeyCollisionError: two keys would become one.
    """
    return renamed(state_dict, wrappers.strip(state_dict, prefix=prefix, partial=partial))


def add_prefix(state_dict: Mapping[str, Any], prefix: str = "module.") -> OrderedDict[str, Any]:
    """A state dict with a prefix before every key; otherwise as `strip_prefix`."""
    return renamed(state_dict, wrappers.add(state_dict, prefix))


def renamed(state_dict: Mapping[str, Any], renaming: Renaming) -> OrderedDict[str, Any]:
    """A plain state dict under new keys, its `_metadata` under new paths."""
    made = OrderedDict((renaming.keys[key], value) for key, value in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        made._metadata = OrderedDict(renaming.metadata(metadata))  # type: ignore[attr-defined]
    return made
