"""Rows that the answers of several verbs have in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.cli import answers
    from ckptfix.keys.renaming import Renaming
    from ckptfix.report import Spec


def spec(found: Spec) -> answers.Spec:
    """What lies under a key."""
    shape = None if found.shape is None else list(found.shape)
    return {"shape": shape, "dtype": found.dtype, "kind": found.kind}


def renamed(path: str, renaming: Renaming, keys: Mapping[str, str]) -> answers.Renamed:
    """What became of keys of the state dict at a path: all that are renamed, or some of them."""
    return {
        "path": path,
        "removed": renaming.removed,
        "added": renaming.added,
        "keys": dict(keys),
    }
