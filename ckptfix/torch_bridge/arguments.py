"""What functions of the library were given, and what they wanted, where that is something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ckptfix.errors import ArgumentError, UnsupportedError
from ckptfix.torch_bridge.describe import describe
from ckptfix.tree.document import Global, Inert, OrderedMap


def are_swapped(model: object, path: object) -> bool:
    """Whether a model stands where a path should, and no model where it should."""
    return isinstance(path, nn.Module) and not isinstance(model, nn.Module)


def check(model: object, path: object, call: str) -> None:
    """Raise `ArgumentError` where a model is none; `call` is how the function is called."""
    if isinstance(model, nn.Module):
        return
    if are_swapped(model, path):
        raise ArgumentError("the arguments are swapped", hint=f"call {call}")
    what = "a class, not a model" if isinstance(model, type) else f"a {type(model).__name__}"
    raise ArgumentError(f"an nn.Module is wanted as the model, and this is {what}", hint=call)


def check_state_dict(given: object, function: str) -> None:
    """Raise `ArgumentError` where something is no state dict, and say what to give instead."""
    if isinstance(given, nn.Module):
        hint = f"give its state dict: ckptfix.{function}(model.state_dict())"
        raise ArgumentError("a state dict is wanted, not a model", hint=hint)
    if not isinstance(given, Mapping):
        what = "a path" if isinstance(given, str) or hasattr(given, "__fspath__") else "this"
        hint = f"give what is in it: ckptfix.{function}(ckptfix.load_state_dict(path))"
        if what == "this":
            what, hint = f"a {type(given).__name__}", "give what nn.Module.state_dict gives"
        raise ArgumentError(f"a state dict is wanted, not {what}", hint=hint)
    odd = next((key for key in given if not isinstance(key, str)), None)
    if odd is not None:
        hint = "give what nn.Module.state_dict gives"
        raise ArgumentError(f"a state dict is wanted, and {odd!r} is no key of one", hint=hint)
    if any(isinstance(value, torch.Tensor) for value in given.values()):
        return
    inner = [key for key, value in given.items() if _is_state_dict(value)]
    if inner:
        hint = f"give what is in it: ckptfix.{function}(checkpoint[{inner[0]!r}])"
        raise ArgumentError(
            f"a state dict is wanted, not a checkpoint that has one ({', '.join(inner)})", hint=hint
        )


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def described(state_dict: Mapping[str, Any]) -> OrderedMap:
    """A state dict as a tree; of what cannot be written there is the class alone."""
    made = OrderedMap()
    for key, value in state_dict.items():
        try:
            made[key] = describe(value)
        except UnsupportedError:
            kind = type(value)
            made[key] = Inert(Global(kind.__module__, kind.__qualname__))
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        made.attributes = {"_metadata": OrderedMap(metadata)}
    return made
