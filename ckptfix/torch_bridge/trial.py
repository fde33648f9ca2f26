"""What torch's strict load says of a state dict, asked of the model itself.

A model may have code of its own that renames old keys, resizes a buffer or fills one that is None
while it loads: no comparison of key lists knows what that takes. So the model loads the state dict,
while tensors without memory stand in for its parameters and buffers; then it is given its own back.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ckptfix.torch_bridge import materialize
from ckptfix.torch_bridge.materialize import Materializer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ckptfix.tree.document import Node, Tensor


class Verdict(NamedTuple):
    """What became of a strict load."""

    missing: list[str]
    unexpected: list[str]
    refusal: str = ""
    """What was said, in torch's words or those of the model; empty where it loads."""
    ended: bool = True
    """Whether the model got to the end of it, so that both lists are whole."""


def decides(model: nn.Module) -> bool:
    """Whether a model has code that may change what it takes: its key list alone does not tell."""
    modules = list(model.modules())
    if any(isinstance(one, torch.jit.ScriptModule) or _is_sharded(one) for one in modules):
        return False  # cannot be given stand-ins; and would have to be asked on all ranks at once
    return has_code(model)


def has_code(model: nn.Module) -> bool:
    """Whether loading into a model is more than copying into its parameters and buffers by name."""
    if any(map(_has_loader, model.modules())) or _has_own(model, "load_state_dict"):
        return True
    return not all(map(is_plain, (*model.parameters(), *model.buffers())))


def _is_sharded(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.distributed.fsdp.fully_sharded")


def _has_loader(module: nn.Module) -> bool:
    hooks = (module._load_state_dict_pre_hooks, module._state_dict_hooks)
    own = ("_load_from_state_dict", "state_dict", "_save_to_state_dict")
    return (
        any(hooks)
        or bool(module._load_state_dict_post_hooks)
        or any(_has_own(module, name) for name in own)
    )


def _has_own(module: nn.Module, name: str) -> bool:
    return name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name)


def strict_load(
    model: nn.Module,
    mapping: dict[str, Node],
    byteorder: str = "little",
    *,
    explained: bool = False,
    real: Callable[[], nn.Module] | None = None,
) -> Verdict:
    """What the strict load of a model says of a state dict. The model keeps its values.

    First neither has memory. Where that ends in a way that nothing explains, code of the model may
    want values: the file's are read, and copies of the model's are made. `explained` says that a
    refusal is no wonder; `real` gives a model with values, where this one is on the meta device.
    """
    said = _tried(model, mapping, _Described(byteorder=byteorder), _without_memory)
    explained = explained or bool(said.missing or said.unexpected)
    if not said.refusal or (said.ended and explained):
        return said
    whole = model if real is None else real()
    return _tried(whole, mapping, Materializer(byteorder=byteorder), _copied)


def load(
    model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, assign: bool = False
) -> None:
    """`model.load_state_dict`, also where it is the model's own and knows no `strict`, or `assign`.

    One that does not know `assign` nearly always calls torch's, with the versions of modules beside
    the state dict; torch looks there for it.
    """
    ways: list[dict[str, bool]] = [{"strict": strict, "assign": True}] if assign else []
    ways += [{"strict": strict}, {}]
    for way in ways:
        try:
            model.load_state_dict(state, **way)
        except TypeError as error:
            if not way or not any(name in str(error) for name in way):
                raise
            if "assign" in way:
                _say_assign(model, state)
        else:
            return


def _say_assign(model: nn.Module, state: Any) -> None:
    versions = getattr(state, "_metadata", None) or OrderedDict()
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    state._metadata = OrderedDict(
        (path, {**versions.get(path, {}), "assign_to_params_buffers": True}) for path in paths
    )


class _Described(Materializer):
    """Makes tensors without memory, of the same shapes, strides and dtypes."""

    def __init__(self, byteorder: str) -> None:
        super().__init__(byteorder=byteorder)
        self._made: dict[int, torch.Tensor] = {}

    def tensor(self, tensor: Tensor, *, stay: bool = False) -> torch.Tensor:
        known = self._made.get(id(tensor))
        if known is None:
            dtype: torch.dtype = getattr(torch, tensor.dtype.name)
            known = torch.empty_strided(tensor.shape, tensor.stride, dtype=dtype, device="meta")
            self._made[id(tensor)] = known
        return known


def _tried(
    model: nn.Module,
    mapping: dict[str, Node],
    materializer: Materializer,
    stand_in: Callable[[torch.Tensor], torch.Tensor],
) -> Verdict:
    lists: list[Any] = []
    with _on_trial(model, stand_in), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = model.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda _, keys: lists.append(keys)
        )
        try:
            load(model, materialize.tree(mapping, materializer))
            refusal = ""
        except Exception as error:  # noqa: BLE001  # whatever the model raises is its answer
            refusal = f"{type(error).__name__}: {error}" if not lists else str(error)
        finally:
            handle.remove()
    if not lists:
        return Verdict([], [], refusal, ended=not refusal)
    return Verdict(list(lists[-1].missing_keys), list(lists[-1].unexpected_keys), refusal)


_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextmanager
def _on_trial(model: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The model with other tensors in the place of its own; all its attributes come back."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    tables = [{name: copy.copy(kept[name]) for name in _TABLES} for kept in attributes]
    others: dict[int, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for module in modules:
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            if id(tensor) not in others:
                                others[id(tensor)] = stand_in(tensor)
                            table[name] = others[id(tensor)]  # type: ignore[assignment]
            yield
    finally:
        for module, kept, of_module in zip(modules, attributes, tables, strict=True):
            for name, table in of_module.items():
                kept[name].clear()
                kept[name].update(table)
            vars(module).clear()
            vars(module).update(kept)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind on the meta device; a copy of one that is not of a plain kind."""
    if is_lazy(tensor):
        kind: Any = (
            UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
        )
        return kind(tensor.requires_grad, device="meta", dtype=tensor.dtype)  # type: ignore[no-any-return]
    if not is_plain(tensor):
        return _copied(tensor)
    return _as_it_was(torch.empty_like(tensor, device="meta"), tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same class and kind, with the same values in memory of its own."""
    if is_lazy(tensor) or type(tensor) not in _CLASSES:
        return copy.deepcopy(tensor)
    return _as_it_was(tensor.detach().clone(), tensor)


def _as_it_was(made: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, if another one is."""
    if not isinstance(tensor, nn.Parameter):
        return made
    return nn.Parameter(made, requires_grad=tensor.requires_grad)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes all that has its shape."""
    is_strided = tensor.layout is torch.strided and not tensor.is_quantized
    return is_strided and type(tensor) in _CLASSES


_CLASSES = (torch.Tensor, nn.Parameter, nn.Buffer)
