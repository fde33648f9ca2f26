"""ckptfix loads, converts and repairs PyTorch checkpoints, without running code from them.

The ten things that people do:

    ckptfix.load_into(model, path)               fill a model from a file, made to fit
    ckptfix.load_state_dict(path, model=model)   torch tensors, keyed as the model has them
    ckptfix.load(path)                           everything in a file, as torch.load gives it
    ckptfix.open(path)                           what is in a file, without loading it
    ckptfix.open(path).tensor(key)               one tensor; a slice of rows reads those rows
    ckptfix.open(path).strip_prefix().save(out)  a copy: to_cpu, cast, drop, rename, merge, …
    ckptfix.check(model, path)                   whether it loads as it stands
    ckptfix.diff(a, b)                           how two checkpoints differ
    ckptfix.save(value, path)                    write .pt or .safetensors, whole or not at all
    ckptfix.strip_prefix(state_dict)             a plain dict without `module.`; add_prefix

`help(ckptfix.load_into)` tells of each. What goes wrong is a `ckptfix.CkptfixError`: it says what
happened, where, and what may help. Nothing here prints. Importing this imports neither torch nor
anything heavy; names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptfix.api import Checkpoint as Checkpoint
    from ckptfix.api import check as check
    from ckptfix.api import diff as diff
    from ckptfix.api import open as open  # noqa: A004
    from ckptfix.api import save as save
    from ckptfix.diffs.documents import Diff as Diff
    from ckptfix.errors import ArgumentError as ArgumentError
    from ckptfix.errors import BusyError as BusyError
    from ckptfix.errors import ChangedMeaningError as ChangedMeaningError
    from ckptfix.errors import CkptfixError as CkptfixError
    from ckptfix.errors import DamagedError as DamagedError
    from ckptfix.errors import InPlaceError as InPlaceError
    from ckptfix.errors import KeyCollisionError as KeyCollisionError
    from ckptfix.errors import KeyMismatchError as KeyMismatchError
    from ckptfix.errors import NotACheckpointError as NotACheckpointError
    from ckptfix.errors import OutputExistsError as OutputExistsError
    from ckptfix.errors import PartialPrefixError as PartialPrefixError
    from ckptfix.errors import ReadError as ReadError
    from ckptfix.errors import RenameError as RenameError
    from ckptfix.errors import SelectionError as SelectionError
    from ckptfix.errors import TargetError as TargetError
    from ckptfix.errors import UnsafeError as UnsafeError
    from ckptfix.errors import UnsupportedError as UnsupportedError
    from ckptfix.errors import VerifyError as VerifyError
    from ckptfix.errors import WriteError as WriteError
    from ckptfix.findings import Finding as Finding
    from ckptfix.lazy import LazyStateDict as LazyStateDict
    from ckptfix.lazy import LazyTensor as LazyTensor
    from ckptfix.limits import Limits as Limits
    from ckptfix.loaders import add_prefix as add_prefix
    from ckptfix.loaders import load as load
    from ckptfix.loaders import load_into as load_into
    from ckptfix.loaders import load_state_dict as load_state_dict
    from ckptfix.loaders import strip_prefix as strip_prefix
    from ckptfix.report import Report as Report
    from ckptfix.tree.document import Inert as Inert

__version__ = "0.1.0"

_HOMES = {
    "api": ("Checkpoint", "check", "diff", "open", "save"),
    "diffs.documents": ("Diff",),
    "errors": (
        "ArgumentError",
        "BusyError",
        "ChangedMeaningError",
        "CkptfixError",
        "DamagedError",
        "InPlaceError",
        "KeyCollisionError",
        "KeyMismatchError",
        "NotACheckpointError",
        "OutputExistsError",
        "PartialPrefixError",
        "ReadError",
        "RenameError",
        "SelectionError",
        "TargetError",
        "UnsafeError",
        "UnsupportedError",
        "VerifyError",
        "WriteError",
    ),
    "findings": ("Finding",),
    "lazy": ("LazyStateDict", "LazyTensor"),
    "limits": ("Limits",),
    "loaders": ("add_prefix", "load", "load_into", "load_state_dict", "strip_prefix"),
    "report": ("Report",),
    "tree.document": ("Inert",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# There is no `__all__`: with it, `help(ckptfix)` would print hundreds of lines, and
# `from ckptfix import *` would put another `open` in the place of Python's.


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptfix' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ckptfix.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
