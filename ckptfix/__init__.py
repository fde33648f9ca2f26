"""ckptfix converts and repairs PyTorch checkpoints, without running them or holding them in memory.

    import ckptfix

    state_dict = ckptfix.load_state_dict("ddp_cuda.pt", model=net)  # CPU tensors, keyed for net
    report = ckptfix.load_into(net, "ddp_cuda.pt")  # raises KeyMismatchError
    ckptfix.open("ddp_cuda.pt").strip_prefix().to_cpu().save("out.safetensors")

Importing this imports neither torch nor anything heavy; names are resolved when they are first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptfix.api import Checkpoint, check, diff, open, save  # noqa: A004
    from ckptfix.diffs.documents import Diff
    from ckptfix.errors import CkptfixError, KeyMismatchError
    from ckptfix.findings import Finding
    from ckptfix.limits import Limits
    from ckptfix.loaders import add_prefix, load, load_into, load_state_dict, strip_prefix
    from ckptfix.report import Report
    from ckptfix.tree.document import Inert

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CkptfixError",
    "Diff",
    "Finding",
    "Inert",
    "KeyMismatchError",
    "Limits",
    "Report",
    "add_prefix",
    "check",
    "diff",
    "load",
    "load_into",
    "load_state_dict",
    "open",
    "save",
    "strip_prefix",
]

_HOMES = {
    "api": ("Checkpoint", "check", "diff", "open", "save"),
    "diffs.documents": ("Diff",),
    "errors": ("CkptfixError", "KeyMismatchError"),
    "findings": ("Finding",),
    "limits": ("Limits",),
    "loaders": ("add_prefix", "load", "load_into", "load_state_dict", "strip_prefix"),
    "report": ("Report",),
    "tree.document": ("Inert",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptfix' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ckptfix.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
