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
from ckptfix.contents.tensors import as_tensor, is_special_tensor, special_class
from ckptfix.diagnose import damage
from ckptfix.edit import averages, edits, reduce
from ckptfix.errors import ArgumentError, KeyMismatchError, ReadError, UnsupportedError
from ckptfix.formats import embedded
from ckptfix.keys import globs, wrappers
from ckptfix.limits import DEFAULT, Limits
from ckptfix.match import judge, mismatches
from ckptfix.match import target as targets
from ckptfix.match.choose import match
from ckptfix.report import META, describe
from ckptfix.torch_bridge import arguments, filling, materialize, plain
from ckptfix.tree.document import Document, Inert
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ckptfix.door import File
    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.choose import Match
    from ckptfix.report import Report
    from ckptfix.torch_bridge.materialize import MapLocation
    from ckptfix.tree import document as described
    from ckptfix.tree.document import Node


def load(
    path: File,
    *,
    map_location: MapLocation = "cpu",
    mmap: bool = False,
    verify: bool = False,
    limits: Limits = DEFAULT,
) -> Any:
    """Everything in a checkpoint, as `torch.load` gives it, without running anything from the file.

    Tensors have the shapes, strides, dtypes and sharing that were saved. Objects of unknown classes
    come back inert (`Inert`).

    Args:
        path: a file in any container that ckptfix reads: its path, its bytes, or the open file.
        map_location: where tensors go: a device, a mapping of saved tags to devices, or a
            callable, as in `torch.load`; `"auto"` is the visible GPU with the most free memory,
            the CPU if there is none.
        mmap: whether tensors lie over a private map of the file, as in `torch.load`: then nothing
            is read before it is used, and no memory is taken. Only for files that nobody writes to
            meanwhile: what overwrites one in place, as `torch.save` does, changes what was loaded,
            or ends the process. Without it tensors have memory of their own.
        verify: whether to read every byte first and hold it against the checksums on record, which
            takes as long as reading the file; `torch.load` never does. Names, shapes and the bounds
            of each tensor are always checked.
        limits: how much the file may ask for before it is refused.

    Returns:
        What was saved: nearly always a dict.

    Raises:
        ReadError: the file is not a checkpoint, is damaged, unsafe or unsupported; or it was
            written to meanwhile.
        ArgumentError: it is neither a path, nor bytes, nor an open file.

    Example:
        >>> import ckptfix
        >>> checkpoint = ckptfix.load("training.pt")
        >>> checkpoint["epoch"], checkpoint["model"]["0.bias"].shape
        (3, torch.Size([4]))
    """
    document = door.read(path, limits)
    reduce.check_one(document)
    if verify:
        damage.check_tensors(document, document.root)
    materializer = _materializer(document, map_location, mmap)
    loaded = materialize.tree(document.root, materializer)
    materializer.check()
    return loaded


def load_state_dict(
    path: File,
    *,
    model: nn.Module | None = None,
    select: str | None = None,
    average: bool = False,
    drop: str | Sequence[str] = (),
    strict: bool = True,
    map_location: MapLocation = "cpu",
    mmap: bool = False,
    verify: bool = False,
    limits: Limits = DEFAULT,
) -> OrderedDict[str, Tensor]:
    """The state dict in a checkpoint, keyed as `model` expects it.

    The state dict that fits is found, prefixes are stripped, added or exchanged as the model wants
    them, the part of a larger model that is meant is taken out, and a tie that was not saved is
    made: as `ckptfix fix` does it. What the model does not have is left out, and a `UserWarning`
    names it. Without a model the keys stay as they are saved. `_metadata` comes along.

    Args:
        path: a file in any container that ckptfix reads: its path, its bytes, or the open file.
        model: what the keys have to fit; it is not changed. Where it has code of its own for
            loading, that code is run, and all that the model holds is put back: tensors,
            attributes, lists, dicts, sets. What such code writes elsewhere stays.
        select: the path of the state dict inside the checkpoint, where it holds several.
        average: whether to take the averages of the weights (EMA, SWA) instead of the weights.
        drop: keys to leave out, by a pattern of the whole key, such as `*lora_*`, or several.
        strict: whether every key and shape of the model has to be there; otherwise the nearest
            names are taken.
        map_location: as in `load`.
        mmap: as in `load`.
        verify: as in `load`, for the bytes of this state dict.
        limits: as in `load`.

    Returns:
        Torch tensors by key, and extra state as plain data; `_metadata` comes along.

    Raises:
        ReadError: the file cannot be read, or with `verify`, a byte of it has changed.
        SelectionError: there is no state dict, or more than one could be meant.
        RenameError: the keys fit, or come nearest, in two ways.
        UnsupportedError: it holds a tensor without bytes, or one of a class of its own.
        KeyMismatchError: with `strict`, the keys or shapes do not fit; carries the `Report`.
        ArgumentError: the path is none, nor bytes, nor an open file; or the model is no module.

    Example:
        >>> import ckptfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> net.load_state_dict(ckptfix.load_state_dict("ddp.pt", model=net))
        <All keys matched successfully>
    """
    if model is not None:
        arguments.check(model, path, "ckptfix.load_state_dict(path, model=model)")
    document, select = embedded.taken(door.read(path, limits), select)
    if average:
        document, select, _ = averages.take(document, select)
    if model is None:
        reduce.check_one(document)
        mapping = choose(document, select).mapping
        gone = globs.dropped(mapping, _patterns(drop), document.name)
        kept = edits.mapping_without(mapping, gone) if gone else mapping
        loaded, unknown = _loaded(document, kept, map_location, mmap, verify, strict)
        if unknown:
            warnings.warn(_not_built(document, unknown), stacklevel=2)
        return loaded
    found = match(
        document, targets.of_module(model), select, partly=not strict, drop=_patterns(drop)
    )
    if found.unused:
        warnings.warn(_left_out(document, model, found), stacklevel=2)
    if found.report.changes:
        warnings.warn(_changes(document, found), stacklevel=2)
    loaded, unknown = _loaded(document, found.mapping(), map_location, mmap, verify, strict)
    if unknown:
        warnings.warn(_not_built(document, unknown), stacklevel=2)
    return loaded


def load_into(
    model: nn.Module,
    path: File,
    *,
    select: str | None = None,
    average: bool = False,
    drop: str | Sequence[str] = (),
    strict: bool = True,
    map_location: MapLocation = "cpu",
    mmap: bool = False,
    verify: bool = False,
    limits: Limits = DEFAULT,
) -> Report:
    """Load a checkpoint into a model, wherever the model's parameters live.

    Parameters that have memory get values, as with `load_state_dict`. Those on the meta device get
    what was loaded in their place, with the model's dtypes, ties and `requires_grad`: they are new
    objects then, so make the optimizer afterwards.

    Args:
        model: the module to load into; unchanged where this raises.
        path: a file in any container that ckptfix reads: its path, its bytes, or the open file.
        select: the path of the state dict inside the checkpoint, where it holds several.
        average: whether to take the averages of the weights (EMA, SWA) instead of the weights.
        drop: keys to leave out, by a pattern of the whole key, such as `*lora_*`, or several.
        strict: whether every key of the model has to be there. Shapes have to match where keys do,
            as in torch.
        map_location: where parameters go that are on the meta device; others stay where they are.
        mmap: as in `load`; the map is needed afterwards only for what was on the meta device.
        verify: as in `load`, for the bytes that are loaded, before the model is touched.
        limits: as in `load`.

    Returns:
        How the keys compared. `unexpected` are those that the model does not have and that were
        left out, as `ckptfix fix` leaves them out; `passed_over` tells of averages that fit as
        well. `loads` is True where the model got all that it wants. With `strict=False`, `missing`
        are the keys that kept their values. `assigned` counts what was on the meta device and is
        loaded; `on_meta` names what is still there, and a `UserWarning` does.

    Raises:
        KeyMismatchError: the keys or shapes do not fit; carries the `Report`, and prints as a list.
        ReadError, SelectionError, RenameError, UnsupportedError: as in `load_state_dict`.
        ArgumentError: the model is no module, such as where the arguments are swapped.

    Example:
        >>> import ckptfix, torch
        >>> with torch.device("meta"):
        ...     net = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> report = ckptfix.load_into(net, "ddp.pt")
        >>> report
        <All keys matched successfully>
        >>> report.assigned, net[0].weight.device
        (2, device(type='cpu'))
    """
    arguments.check(model, path, "ckptfix.load_into(model, path)")
    document, select = embedded.taken(door.read(path, limits), select)
    if average:
        document, select, _ = averages.take(document, select)
    wanted = targets.of_module(model)
    found = match(document, wanted, select, partly=not strict, drop=_patterns(drop))
    if found.report.refused:
        raise mismatches.error(document, found.state, found.report, wanted)
    if found.report.changes:
        warnings.warn(_changes(document, found), stacklevel=2)
    mapping = found.mapping()
    if not mmap and _is_large(mapping) and filling.copies(model, mapping):
        _poured(document, model, mapping, verify)
        return replace(found.report, left_out=True)
    place = map_location if filling.without_memory(model) else "cpu"
    loaded, unknown = _loaded(document, mapping, place, mmap, verify, strict)
    try:
        filled = filling.fill(model, loaded, strict=strict)
    except Exception as error:
        report = replace(found.report, refusals=[f"{type(error).__name__}: {error}"])
        raise mismatches.error(document, found.state, report, wanted) from error
    if filled.on_meta:
        warnings.warn(_without_memory(document, model, filled.on_meta), stacklevel=2)
    report = replace(found.report, left_out=True, **filled._asdict())
    return replace(report, missing=[*report.missing, *unknown])


STAGED = 1 << 30
"""Bytes of tensors up to which all are read before a model is touched that has values."""


def _is_large(mapping: Mapping[str, Node]) -> bool:
    """Whether a state dict of nothing but dense tensors has more than `STAGED` bytes of them."""
    tensors = [as_tensor(node) for node in mapping.values()]
    return all(tensors) and sum(tensor.nbytes for tensor in tensors if tensor) > STAGED


def _poured(
    document: Document, model: nn.Module, mapping: Mapping[str, Node], verify: bool
) -> None:
    """A large state dict copied into a model one storage at a time. All was judged before."""
    if verify:
        damage.check_tensors(document, mapping)
    groups: dict[int, dict[str, described.Tensor]] = {}
    for key, node in mapping.items():
        if (tensor := as_tensor(node)) is not None:
            groups.setdefault(id(tensor.storage), {})[key] = tensor
    try:
        for group in groups.values():
            materializer = _materializer(document, "cpu", mmap=False)
            filling.pour(model, group, materializer)
            materializer.check()
    except ReadError as error:
        error.details = (*error.details, "the model has a part of it now: load it again")
        raise


def _without_memory(document: Document, model: nn.Module, names: list[str]) -> str:
    kind, verb = type(model).__name__, "is" if len(names) == 1 else "are"
    return f"{document.name} has not all of {kind}: {listed(names)} {verb} still on the meta device"


def _patterns(drop: str | Sequence[str]) -> Sequence[str]:
    return [drop] if isinstance(drop, str) else drop


def _left_out(document: Document, model: nn.Module, found: Match) -> str:
    kind = type(model).__name__
    return f"{document.name}: left out what {kind} does not have: {listed(found.unused)}"


def _not_built(document: Document, keys: Sequence[str]) -> str:
    return f"{document.name}: left out what cannot be built without running code: {listed(keys)}"


def _changes(document: Document, found: Match) -> str:
    return f"{document.name}: values change as torch loads them: {listed(found.report.changes)}"


def _materializer(
    document: Document, map_location: MapLocation, mmap: bool
) -> materialize.Materializer:
    place = materialize.placement(map_location)
    return materialize.Materializer(place, document.byteorder, mapped=mmap)


def _loaded(
    document: Document,
    mapping: dict[str, Node],
    map_location: MapLocation,
    mmap: bool,
    verify: bool,
    strict: bool = True,
) -> tuple[OrderedDict[str, Any], list[str]]:
    """The tensors and plain values of a state dict, and without `strict`, the keys of the rest."""
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
    materializer = _materializer(document, map_location, mmap)
    made = materialize.tree(mapping, materializer)
    materializer.check()
    unknown = {key: cls for key, value in made.items() if (cls := plain.unknown(value))}
    for key, cls in unknown.items():
        if key in kinds:
            raise UnsupportedError(
                f"{key!r} is a tensor of another kind: {kinds[key]}",
                where=document.name,
                hint="load it with torch.load, and give that to ckptfix.strip_prefix",
            )
        if strict:
            raise UnsupportedError(
                f"{key!r} is or holds a {cls}, which is not built, since that would run its code",
                where=document.name,
                hint="pass strict=False, which leaves it out",
            )
        del made[key]
    return made if isinstance(made, OrderedDict) else OrderedDict(made), list(unknown)


def _kind(node: Node) -> str:
    """What a tensor is that is not dense; empty for a dense one, and for what is none."""
    found = spec(node, repaired=True).kind
    if not found and isinstance(node, Inert) and is_special_tensor(node):
        return special_class(node)
    return found


# --- plain dicts


def strip_prefix(
    state_dict: Mapping[str, Any],
    prefix: str | None = None,
    *,
    partial: bool = False,
    model: nn.Module | None = None,
) -> OrderedDict[str, Any]:
    """A state dict without wrapper components, or without the prefix that is named.

    The values are the same objects; `state_dict` is not changed. `_metadata` is renamed with the
    keys. Where only some keys carry `module.`, it stays, and a `UserWarning` says so.

    Args:
        state_dict: what `torch.load` or `nn.Module.state_dict` gave.
        prefix: such as `module.`; None removes what wrappers (DataParallel, torch.compile, FSDP,
            …) added.
        partial: whether to strip the keys that have the prefix even where others do not.
        model: what the keys have to fit: it decides what goes, also what it calls `model.`.

    Returns:
        Another dict, in the same order.

    Raises:
        PartialPrefixError: only some keys carry `prefix`.
        KeyCollisionError: two keys would become one.
        KeyMismatchError: to strip prefixes does not make it load into `model`.
        ArgumentError: it is no state dict, but a path, or a checkpoint that has one in it.

    Example:
        >>> import ckptfix
        >>> list(ckptfix.strip_prefix({"module.weight": 1, "module.bias": 2}))
        ['weight', 'bias']
    """
    arguments.check_state_dict(state_dict, "strip_prefix")
    if model is not None:
        if prefix is not None or partial:
            raise ArgumentError("a model decides what goes", hint="leave out prefix and partial")
        return renamed(state_dict, _for_model(state_dict, model))
    renaming = wrappers.strip(state_dict, prefix=prefix, partial=partial)
    if prefix is None and not partial:
        carrying, lacking = wrappers.own_children(renaming.keys.values())
        if carrying:
            total = len(carrying) + len(lacking)
            warnings.warn(
                f"{len(carrying)} of {total} keys begin with 'module.', which stays, since "
                f"{lacking[0]!r} does not; partial=True strips it from those that do",
                stacklevel=2,
            )
    return renamed(state_dict, renaming)


def _for_model(state_dict: Mapping[str, Any], model: nn.Module) -> Renaming:
    """What stands between the keys and those of a model, if stripping that makes it load."""
    arguments.check(model, None, "ckptfix.strip_prefix(state_dict, model=model)")
    document = Document(arguments.described(state_dict), "memory", "the state dict")
    wanted = targets.of_module(model)
    found = match(document, wanted)
    report = judge.as_it_stands(document, found.state, wanted, found.renaming)
    if found.renaming.added or not report.loads:
        what = f"to strip prefixes does not make it match {wanted.name}"
        hint = "save it, and take ckptfix.load_state_dict(path, model=model)"
        details = describe(report)
        raise KeyMismatchError(report, what, where=document.name, hint=hint, details=details)
    return found.renaming


def add_prefix(state_dict: Mapping[str, Any], prefix: str = "module.") -> OrderedDict[str, Any]:
    """A state dict with a prefix before every key; otherwise as `strip_prefix`.

    Args:
        state_dict: what `torch.load` or `nn.Module.state_dict` gave.
        prefix: with or without the dot that ends it.

    Returns:
        Another dict, in the same order.

    Raises:
        ArgumentError: it is no state dict, but a path, or a checkpoint that has one in it.

    Example:
        >>> import ckptfix
        >>> list(ckptfix.add_prefix({"weight": 1}, "net"))
        ['net.weight']
    """
    arguments.check_state_dict(state_dict, "add_prefix")
    return renamed(state_dict, wrappers.add(state_dict, prefix))


def renamed(state_dict: Mapping[str, Any], renaming: Renaming) -> OrderedDict[str, Any]:
    """A plain state dict under new keys, its `_metadata` under new paths."""
    made = OrderedDict((renaming.keys[key], value) for key, value in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        made._metadata = OrderedDict(renaming.metadata(metadata))  # type: ignore[attr-defined]
    return made
