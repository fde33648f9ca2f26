"""What a state dict has, held against what a target wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.contents.specs import specs
from ckptfix.report import SPECIAL, Difference, Report, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.target import Target


def compare(found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> Report:
    """Hold what a state dict has against what a target wants."""
    common = [key for key in found if key in wanted]
    shapes = [
        Difference(key, found[key], wanted[key]) for key in common if not _fits(key, found, wanted)
    ]
    mismatching = {difference.key for difference in shapes}
    matched = [key for key in common if key not in mismatching]
    missing = [key for key in wanted if key not in found]
    return Report(
        matched,
        missing,
        [key for key in found if key not in wanted],
        shapes,
        [Difference(key, found[key], wanted[key]) for key in matched if _casts(key, found, wanted)],
        sum(spec.numel for spec in wanted.values()),
        sum(wanted[key].numel for key in (*missing, *mismatching)),
    )


def _fits(key: str, found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> bool:
    if key.rpartition(".")[2] == "_extra_state":
        return True  # a module takes it as it is, and torch compares no shapes
    shape, expected = found[key].shape, wanted[key].shape
    if shape is None or expected is None:
        return expected is None or found[key].dtype == SPECIAL
    return shape == expected or (not expected and len(shape) == 1)  # torch 0.3 had no 0-d tensors


def _casts(key: str, found: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> bool:
    return found[key].dtype not in (None, SPECIAL, wanted[key].dtype) and bool(wanted[key].dtype)


def report(
    state: StateDict,
    wanted: Target,
    renaming: Renaming | None = None,
    tied: Mapping[str, str] | None = None,
) -> Report:
    """How a state dict compares with a target, once it is renamed.

    `tied` has keys to be added, each as another name of a key that is there then.
    """
    found = specs(state.mapping)
    if renaming is not None:
        found = {renaming.keys[key]: spec for key, spec in found.items()}
    found.update({key: found[other] for key, other in (tied or {}).items()})
    return compare(found, wanted.specs_for(state))
