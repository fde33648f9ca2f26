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
from torch.utils._python_dispatch import TorchDispatchMode

from ckptfix.torch_bridge import materialize
from ckptfix.torch_bridge.materialize import Materializer
from ckptfix.tree.document import Inert
from ckptfix.tree.walk import walk

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
    grown: tuple[str, ...] = ()
    """Names of parameters and buffers that the model did not have before."""
    is_idle: bool = False
    """Whether nothing of the model has changed: it took nothing."""


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
    own = ("_load_from_state_dict", "state_dict", "_save_to_state_dict", "set_extra_state")
    return (
        any(hooks)
        or bool(module._load_state_dict_post_hooks)
        or any(_has_own(module, name) for name in own)
    )


def _has_own(module: nn.Module, name: str) -> bool:
    return name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name)


def extra_states_not_taken(model: nn.Module) -> set[str]:
    """Keys of extra states that modules give, and cannot take: torch refuses them."""
    return {
        f"{name}.{_EXTRA}" if name else _EXTRA
        for name, module in model.named_modules(remove_duplicate=False)
        if _has_own(module, "get_extra_state") and not _has_own(module, "set_extra_state")
    }


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
    with _on_trial(model, stand_in) as traces, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = model.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda _, keys: lists.append(keys)
        )
        try:
            state = materialize.tree(mapping, materializer)
            _skip_what_is_not_built(model, state)
            with traces:
                load(model, state)
            refusal = ""
        except Exception as error:  # noqa: BLE001  # whatever the model raises is its answer
            refusal = f"{type(error).__name__}: {error}" if not lists else str(error)
        finally:
            handle.remove()
        given, grown, is_idle = traces.given, tuple(traces.grown), traces.is_idle
        had = list(traces.before)
    if not lists:
        missing = [] if refusal else [key for key in had if key not in given]
        return Verdict(missing, [], refusal, not refusal, grown, is_idle)
    missing, unexpected = list(lists[-1].missing_keys), list(lists[-1].unexpected_keys)
    return Verdict(missing, unexpected, refusal, True, grown, is_idle)


def _skip_what_is_not_built(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Ask no module about an extra state that holds objects of unknown classes."""
    for name, module in model.named_modules():
        extra = state.get(f"{name}.{_EXTRA}" if name else _EXTRA)
        if any(isinstance(inner, Inert) for _, inner in walk(extra)):
            vars(module)["set_extra_state"] = lambda _: None


_EXTRA = "_extra_state"


@contextmanager
def _on_trial(
    model: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[_Traces]:
    """The model with other tensors in the place of its own; all that it holds comes back.

    What its code writes to objects of other classes, or to what is none of its attributes, stays.
    """
    kept = _Contents(model)
    others: dict[int, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            for table, key, tensor in kept.tensors():
                if id(tensor) not in others:
                    others[id(tensor)] = stand_in(tensor)
                table[key] = others[id(tensor)]
            yield _Traces(model)
        finally:
            kept.put_back()


class _Contents:
    """What lies in a model: its attributes, and the lists, dicts and sets among them."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, tuple[Any, Any]] = {}
        self._tables: set[int] = set()
        pending: list[Any] = [model]
        seen = set()
        while pending:
            node = pending.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, nn.Module):
                self._tables |= {id(node._parameters), id(node._buffers)}
                pending.append(vars(node))
            elif isinstance(node, (dict, list, tuple, set)):
                if not isinstance(node, tuple):
                    self._found[id(node)] = node, _copy(node)
                pending.extend(dict.values(node) if isinstance(node, dict) else node)

    def tensors(self) -> Iterator[tuple[Any, Any, torch.Tensor]]:
        """Each tensor with what holds it, and under which key."""
        for node, kept in self._found.values():
            rows = kept.items() if isinstance(kept, dict) else enumerate(kept)
            for key, value in rows if isinstance(kept, (dict, list)) else ():
                if type(value) in _CLASSES or (
                    id(node) in self._tables and isinstance(value, torch.Tensor)
                ):
                    yield node, key, value

    @property
    def changed(self) -> bool:
        """Whether any of it holds other things now."""
        return any(_rows(node) != _rows(kept) for node, kept in self._found.values())

    def put_back(self) -> None:
        for node, kept in self._found.values():
            if _rows(node) != _rows(kept):
                _refill(node, kept)


def _refill(node: Any, kept: Any) -> None:
    """Give a container its rows back, whatever a class of its own makes of its methods."""
    if isinstance(node, list):
        list.__setitem__(node, slice(None), kept)
    elif isinstance(node, set):
        set.clear(node)
        set.update(node, kept)
    else:
        kind: Any = OrderedDict if isinstance(node, OrderedDict) else dict
        kind.clear(node)
        for key, value in kept.items():
            kind.__setitem__(node, key, value)


def _copy(node: Any) -> Any:
    """The same rows in a plain list, dict or set."""
    if isinstance(node, dict):
        return dict(zip(dict.keys(node), dict.values(node), strict=True))
    return list(node) if isinstance(node, list) else set(node)


def _rows(node: Any) -> list[Any]:
    """What a container holds, by identity."""
    if isinstance(node, dict):
        return [(id(key), id(value)) for key, value in node.items()]
    return [id(item) for item in node]


class _Traces(TorchDispatchMode):
    """What a load writes to, of the parameters and buffers of a model on trial."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self.before = _named(model)
        self._memory = {key: _memory(tensor) for key, tensor in self.before.items()}
        self._kinds = {key: type(tensor) for key, tensor in self.before.items()}
        self._contents = _Contents(model)
        self._written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else given.get(argument.name)
                if isinstance(value, torch.Tensor):
                    self._written.add(_memory(value))
        return func(*args, **given)

    @property
    def given(self) -> set[str]:
        """Names of what has other values now, or a tensor that was not there."""
        now = _named(self._model)
        return {key for key, tensor in now.items() if self._is_given(key, tensor)}

    @property
    def grown(self) -> list[str]:
        """Names that the model did not have before."""
        return [key for key in _named(self._model) if key not in self.before]

    @property
    def is_idle(self) -> bool:
        """Whether nothing was written, and nothing in the model is another thing now."""
        return not self.given and not self._contents.changed

    def _is_given(self, key: str, tensor: torch.Tensor) -> bool:
        memory = _memory(tensor)
        return (
            tensor is not self.before.get(key)
            or memory in self._written
            or memory != self._memory[key]
            or type(tensor) is not self._kinds[key]  # a lazy one has a shape now
        )


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _memory(tensor: torch.Tensor) -> int:
    """What names the memory of a tensor, or the tensor where it has none of its own."""
    if is_lazy(tensor) or not is_plain(tensor):
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind on the meta device; a copy of one that is not of a plain kind."""
    if is_lazy(tensor):
        return _lazy(tensor, "meta")
    if not is_plain(tensor):
        return _copied(tensor)
    return _as_it_was(torch.empty_like(tensor, device="meta"), tensor)


def _lazy(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Another parameter or buffer that has no shape yet."""
    kind: Any = UninitializedParameter if isinstance(tensor, nn.Parameter) else UninitializedBuffer
    return kind(tensor.requires_grad, device=device, dtype=tensor.dtype)  # type: ignore[no-any-return]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same class and kind, with the same values in memory of its own."""
    if is_lazy(tensor):
        return _lazy(tensor, tensor.device)
    if type(tensor) not in _CLASSES:
        return copy.deepcopy(tensor)
    if tensor.is_quantized:  # not all of them can be cloned
        return _as_it_was(copy.deepcopy(tensor.detach()), tensor)
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
