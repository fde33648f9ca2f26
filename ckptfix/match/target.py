"""Targets: what keys are held against. A model, another checkpoint, or a list of keys.

A model is built on torch's meta device, so that it takes no memory however large it is. Building
one runs its code: that is the user's own code, named by the user, never anything from a
checkpoint.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ckptfix import door
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import FileSource
from ckptfix.contents.specs import specs
from ckptfix.contents.state_dicts import choose
from ckptfix.errors import CkptfixError, ReadError, SelectionError, TargetError
from ckptfix.hints import Command, Hint, command, naming, shell
from ckptfix.report import ANYTHING, LAZY, META, Spec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from torch import nn

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.findings import Finding
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


_EXTRA = "_extra_state"
_COUNTER = "num_batches_tracked"


def _dicts(mapping: Mapping[str, Any]) -> list[dict[Any, Any]]:
    return [value for value in mapping.values() if isinstance(value, dict)]


def of_module(module: nn.Module, name: str | None = None) -> Target:
    """The target that a model is, wherever it lives."""
    from ckptfix.torch_bridge import trial

    found = {key: _spec(key, value) for key, value in module.state_dict().items()}
    named = module.named_buffers(remove_duplicate=False)
    buffers = frozenset(key for key, _ in named if key in found)
    model = module if trial.decides(module) else None
    name = name or type(module).__name__
    return Target(name, found, _ties(module), buffers, model, in_order=True)


def _spec(key: str, value: Any) -> Spec:
    """What a model wants under a key."""
    import torch
    from torch.nn.parameter import is_lazy
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_lazy(value):
        return Spec(None, None, LAZY)
    if not isinstance(value, torch.Tensor) or key.endswith(_EXTRA):
        return ANYTHING
    kind = "" if value.layout is torch.strided else str(value.layout).removeprefix("torch.")
    if value.is_quantized:
        is_per_tensor = value.qscheme() is torch.per_tensor_affine
        kind = "quantized" if is_per_tensor else "quantized per channel"
    if value.is_nested:
        return Spec(None, str(value.dtype).removeprefix("torch."), "nested")
    is_wrapper: bool = is_traceable_wrapper_subclass(value)
    if is_wrapper:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return Spec(tuple(value.shape), str(value.dtype).removeprefix("torch."), kind)


def _ties(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names that a model has for one parameter or buffer."""
    groups: dict[int, list[str]] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


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
    listed = _listed_keys(Place(path))
    if listed is not None:
        return Target(str(path), listed, buffers=frozenset(filter(_is_computed, listed)))
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
        listing = json.loads(source.read(0, source.size))
        states = [(state["path"], _listed_specs(state)) for state in _plain(listing["state_dicts"])]
    except (ReadError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if len(states) != 1:
        listed = ", ".join(str(where) for where, _ in states)
        raise TargetError(
            f"lists {len(states)} state dicts: {listed or 'none'}",
            where=place,
            hint=Hint(
                "inspect a file that holds the one that is meant",
                command("inspect", "FILE", json=True),
            ),
        )
    return states[0][1]


def _listed_specs(state: dict[str, Any]) -> dict[str, Spec]:
    tensors = {row["key"]: Spec(tuple(row["shape"]), row["dtype"]) for row in state["tensors"]}
    return tensors | {key: Spec(None, None) for key in state["others"]}


def of_reference(reference: str, init: str | None = None) -> Target:
    """The model that `FILE.py:NAME` or `package.module:NAME` names, built on the meta device.

    `init` is JSON: an object gives keyword arguments, an array positional ones. The current
    folder can be imported from. `NAME` is an `nn.Module` class, a function that returns a model,
    or a model. Raises `TargetError`.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise TargetError(
            "is not of the form FILE.py:NAME or package.module:NAME",
            where=f"--model {reference}",
            hint=naming("for example", "model", "models/foonet.py:FooNet"),
        )
    arguments, keywords = _arguments(init)
    found = _attribute(_import(where, reference), name, reference)

    def build(device: str) -> nn.Module:
        return _build(found, arguments, keywords, reference, device)

    try:
        target = of_module(build("meta"), reference)
    except TargetError as error:
        if not isinstance(error.__cause__, (RuntimeError, NotImplementedError)):
            raise
        return of_module(build("cpu"), reference)  # its code wants values, which meta has not
    return target if target.model is None else replace(target, real=lambda: build("cpu"))


def _arguments(init: str | None) -> tuple[list[Any], dict[str, Any]]:
    try:
        given = json.loads(init) if init else {}
    except ValueError as error:
        raise TargetError(f"is not JSON ({error})", where=f"--init {init}", hint=_EXAMPLE) from None
    if isinstance(given, dict):
        return [], given
    if isinstance(given, list):
        return given, {}
    raise TargetError(
        "is neither a JSON object nor an array", where=f"--init {init}", hint=_EXAMPLE
    )


_EXAMPLE = naming("for example", "init", '{"layers": 3}')


def _import(where: str, reference: str) -> ModuleType:
    folders = [Place(".").resolved]
    if _is_file(where):
        folders.append(Place(where).folder.resolved)
    for folder in folders:
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):
            return _import_file(where) if _is_file(where) else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        place = Place(where)
        absent = _is_file(where) and not place.is_file
        see = Hint("see what is there", shell("ls", files=[place.folder.name]))
        raise TargetError(
            f"cannot be imported: {_describe(error)}",
            where=f"--model {reference}",
            hint=see if absent else Hint("try it", _try(where)),
        ) from error


def _try(where: str) -> Command:
    python = PurePath(sys.executable).name
    return (
        shell(python, files=[where]) if _is_file(where) else shell(python, "-c", f"import {where}")
    )


def _is_file(where: str) -> bool:
    return where.endswith(".py")


def _import_file(where: str) -> ModuleType:
    name = PurePath(where).stem
    if not Place(where).is_file:
        raise FileNotFoundError(f"there is no file {where}")
    spec = importlib.util.spec_from_file_location(name, where)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, name: str, reference: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        models = [key for key, value in vars(module).items() if _is_model_class(value, module)]
        hint = f"it defines {', '.join(models) or 'no class'}"
        raise TargetError(f"there is no {name!r} in it", where=f"--model {reference}", hint=hint)
    return found


def _is_model_class(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _build(
    found: Any, arguments: list[Any], keywords: dict[str, Any], reference: str, device: str
) -> nn.Module:
    import torch

    try:
        with torch.device(device), redirect_stdout(sys.stderr):
            model = found if isinstance(found, torch.nn.Module) else found(*arguments, **keywords)
    except (Exception, SystemExit) as error:
        raise TargetError(
            f"cannot be built: {_describe(error)}",
            where=f"--model {reference}",
            hint=naming("give its arguments as JSON", "init", '{"name": value}'),
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise TargetError(
            f"gives a {type(model).__name__}, not an nn.Module",
            where=f"--model {reference}",
            hint="name an nn.Module class, or a function that returns a model",
        )
    return model


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
