"""Quantizing on the meta device gives a dense tensor, without a word."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def no_quantizing(device: str) -> AbstractContextManager[Any]:
    """Where a model is built on the meta device, what quantizes fails instead."""
    return _Refusing() if device == "meta" else nullcontext()


class _Refusing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith("quantize_per_"):
            raise NotImplementedError(f"{func.__name__} wants values")
        return func(*args, **(kwargs or {}))
