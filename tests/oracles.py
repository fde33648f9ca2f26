"""The command line as a process, and equality of loaded checkpoints to the bit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ckptfix.cli import group
from ckptfix.errors import CkptfixError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def ckptfix_command(*arguments: str | Path, cwd: Path | None = None) -> Any:
    """Run `ckptfix` as a process of its own; returns what `subprocess.run` does."""
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def done(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run `ckptfix`, insist that it succeeds, and return its answer."""
    ran = ckptfix_command(*arguments, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return str(ran.stdout)


def code_of(*arguments: str) -> int:
    """The exit code of a command, in this process."""
    try:
        return int(group.main(list(arguments), "ckptfix", standalone_mode=False))
    except CkptfixError:
        return 2


def module_in(path: Path, name: str) -> ModuleType:
    """The module that a file is, under a name of its own, so that its classes can be pickled."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a dense tensor in row-major order, as they lie in memory."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not dense.numel():
        return b""
    flat = dense.as_strided((dense.numel(),), (1,))  # a single element may have any stride
    return bytes(flat.view(torch.uint8).numpy())


def unlike(one: Any, other: Any, where: str = "") -> str | None:
    """Where two loaded trees first differ, to the bit and in order; None where they are equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return None if _same_tensor(one, other) else where or "/"
    if type(one) is not type(other):
        return where or "/"
    if isinstance(one, Mapping):
        if list(one) != list(other):
            return f"{where}: keys"
        if getattr(one, "_metadata", None) != getattr(other, "_metadata", None):
            return f"{where}: _metadata"
        return _first((one[key], other[key], f"{where}/{key}") for key in one)
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{where}: length"
        rows = zip(one, other, strict=True)
        return _first((a, b, f"{where}/{index}") for index, (a, b) in enumerate(rows))
    if hasattr(one, "__dict__"):
        return unlike(vars(one), vars(other), where)
    if isinstance(one, (float, complex)):
        return None if repr(one) == repr(other) else where or "/"  # nan is nan, -0.0 is not 0.0
    return None if one == other else where or "/"


def has_a_reason(refusal: CkptfixError) -> None:
    """A refusal says what is wrong, and has a code of its own."""
    assert str(refusal)
    assert refusal.code != "error"


def sharing(tree: Any) -> list[tuple[Any, ...]]:
    """Strides of the tensors of a loaded tree, and which of its parts are one, in order."""
    known: dict[int, int] = {}
    rows: list[tuple[Any, ...]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, torch.Tensor):
            storage = node.untyped_storage()
            numbers = [known.setdefault(key, len(known)) for key in (id(node), storage._cdata)]
            rows.append((*numbers, node.stride(), node.storage_offset(), storage.nbytes()))
        elif isinstance(node, (dict, list)):
            rows.append((known.setdefault(id(node), len(known)), len(node)))
            pending += list(node.values()) if isinstance(node, dict) else node
        elif isinstance(node, tuple):
            pending += node
    return rows


def _same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout):
        return False
    if one.is_quantized:
        return torch.equal(one, other)
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return bits(one) == bits(other)


def _first(rows: Any) -> str | None:
    return next((found for row in rows if (found := unlike(*row)) is not None), None)
