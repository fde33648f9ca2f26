"""A state dict put into a model: copied into its tensors, or in the place of those without memory.

A model that was built on the meta device has no memory. What is loaded takes the place of its
parameters there, as `load_state_dict(assign=True)` does it, but with the model's dtypes, and tied
ones stay tied; parameters that have memory get values, and stay the objects that they are.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ckptfix.torch_bridge import trial

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ckptfix.torch_bridge.materialize import Materializer
    from ckptfix.tree.document import Tensor


class Filled(NamedTuple):
    """What became of the parameters and buffers that had no memory."""

    assigned: int
    """How many were given a tensor, each counted once however many names it has."""
    on_meta: list[str]
    """The names of those that still have none."""


class _Slot(NamedTuple):
    """A place in a model, and the parameter or buffer that stood there."""

    module: nn.Module
    name: str
    tensor: torch.Tensor
    was_meta: bool

    @property
    def now(self) -> torch.Tensor:
        """What stands there now."""
        tables = self.module._parameters, self.module._buffers
        found = next((table[self.name] for table in tables if self.name in table), None)
        return self.tensor if found is None else found

    def put(self, tensor: torch.Tensor) -> None:
        """Set it, as the module does it: one of torch's keeps a list of its weights besides."""
        if self.now is not tensor:
            setattr(self.module, self.name, tensor)


def _slots(model: nn.Module) -> list[_Slot]:
    return [
        _Slot(module, name, tensor, tensor.is_meta)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def without_memory(model: nn.Module) -> list[str]:
    """The names of parameters and buffers that are on the meta device."""
    return [name for name, tensor in _named(model) if tensor.is_meta]


def fill(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> Filled:
    """Load a state dict into a model, which stays as it was where that raises.

    Raises what `load_state_dict` of the model raises.
    """
    slots = _slots(model)
    if not any(slot.was_meta for slot in slots):
        trial.load(model, state, strict=strict)
        return Filled(0, [])
    try:
        trial.load(model, _detached(state), strict=strict, assign=True)
        _settle(slots)
    except BaseException:
        for slot in slots:
            slot.put(slot.tensor)
        raise
    there = {id(slot.tensor): slot.now for slot in slots if slot.was_meta}
    return Filled(sum(not tensor.is_meta for tensor in there.values()), without_memory(model))


def copies(model: nn.Module, keys: Iterable[str]) -> bool:
    """Whether `pour` does what loading these keys would: the model has memory, and no own code."""
    if trial.has_code(model):
        return False
    there = dict(_named(model))
    return there.keys() >= set(keys) and not any(tensor.is_meta for tensor in there.values())


def pour(model: nn.Module, tensors: Mapping[str, Tensor], materializer: Materializer) -> None:
    """Read tensors into the memory of a model. What raises on the way leaves it with some."""
    there = dict(_named(model))
    with torch.no_grad():
        for key, tensor in tensors.items():
            materializer.copy_into(there[key], tensor)


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _detached(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The same without parameters: torch would put those in the place of buffers."""
    made = OrderedDict(
        (key, value.detach() if isinstance(value, torch.Tensor) else value)
        for key, value in state.items()
    )
    made._metadata = getattr(state, "_metadata", OrderedDict())  # type: ignore[attr-defined]
    return made


def _settle(slots: Iterable[_Slot]) -> None:
    """Parameters that had memory get the values that took their place; the others what they are."""
    given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for slot in slots:
        if slot.now is slot.tensor:
            continue
        if slot.was_meta:
            given.setdefault(id(slot.tensor), (slot.tensor, slot.now))
            continue
        if slot.now.shape == slot.tensor.shape:  # or the model's own loader put another one there
            with torch.no_grad():
                slot.tensor.copy_(slot.now)
            slot.put(slot.tensor)
    pairs = [(old, _like(new.detach(), old)) for old, new in given.values()]
    made = map(_parameter, _apart([new for _, new in pairs]), [old for old, _ in pairs])
    instead = dict(zip(given, made, strict=True))
    for slot in slots:
        if id(slot.tensor) in instead:
            slot.put(instead[id(slot.tensor)])


def _like(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A tensor as copying it into another one would have made it; itself where it is that."""
    if not (trial.is_plain(new) and trial.is_plain(old)):
        return new
    new = new.resolve_conj().resolve_neg().to(old.dtype)
    if new.stride() == old.stride() or (new.is_contiguous() and old.is_contiguous()):
        return new
    made = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=new.device)
    return made.copy_(new)


def _parameter(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A parameter, if the old one was, with what the program wrote on that."""
    if not isinstance(old, nn.Parameter):
        return new
    made = nn.Parameter(new, requires_grad=old.requires_grad)
    vars(made).update(vars(old))
    return made


def _apart(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, but a copy of each that shares memory with one before it.

    A file may hold two names for one tensor where the model has two.
    """
    made = list(tensors)
    reached: dict[torch.device, int] = {}
    rows = [
        (tensor.data_ptr(), index)
        for index, tensor in enumerate(tensors)
        if trial.is_plain(tensor) and tensor.numel() and not tensor.is_meta
    ]
    for begin, index in sorted(rows):
        tensor = tensors[index]
        if begin < reached.get(tensor.device, 0):
            made[index] = tensor.clone()
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        end = begin + tensor.itemsize * (1 + sum((size - 1) * step for size, step in pairs))
        reached[tensor.device] = max(reached.get(tensor.device, 0), end)
    return made
