"""What is refused where keys change what weights mean, and the target has none of them.

The base alone would load and be another model; so it is taken only where somebody says so. Where
what is wanted stands in the file in another form (a mask beside what it masks), that is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.contents.tensors import as_tensor
from ckptfix.door import beside
from ckptfix.errors import ChangedMeaningError
from ckptfix.hints import Hint, adding, command
from ckptfix.keys import meanings
from ckptfix.report import describe
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.meanings import Role
    from ckptfix.report import Report
    from ckptfix.tree.document import Document


def changed(
    document: Document,
    state: StateDict,
    renamed: Mapping[str, str],
    report: Report,
    wanted: str,
) -> ChangedMeaningError | None:
    """The refusal to drop keys that change what those mean which are taken; None: there are none.

    `renamed` has the new name of each key.
    """
    left = set(report.unexpected)
    taken = [key for key, new in renamed.items() if new not in left]
    unused = [key for key, new in renamed.items() if new in left]
    there = sorted(taken)
    roles = meanings.roles(unused)
    gone = sorted(set(unused) - roles.keys())
    told = {key: role for key, role in roles.items() if _speaks_of(role, there, gone)}
    found = {
        key: role
        for key, role in (told | meanings.beside(gone, there)).items()
        if not role.needs_small or _is_small(state, role.subject)
    }
    rest = {renamed[key]: key for key in unused if key not in found}
    layers = meanings.in_layers(rest, [renamed[key] for key in taken])
    found |= {rest[new]: role for new, role in layers.items()}
    if not found:
        return None
    globs = meanings.patterns(found, taken)
    one = len(found) == 1
    what = (
        f"{plural(len(found), 'key')} that {wanted} does not have "
        f"{_change(found.values(), one=one)} what others mean "
        f"({_kinds(found.values())}): {listed(found)}; the base alone is another model"
    )
    return ChangedMeaningError(
        report,
        what,
        where=_where(document, state),
        hint=adding("to take the base alone", "drop", *globs),
        options={"drop": globs},
    )


def changed_beside(
    document: Document,
    state: StateDict,
    others: Iterable[StateDict],
    renamed: Mapping[str, str],
    report: Report,
    wanted: str,
) -> ChangedMeaningError | None:
    """The refusal of a state dict whose weights another dict of the file changes; or None.

    Such as `masks` or `lora` beside `model`, with keys that speak of what is taken.
    """
    left = set(report.unexpected)
    new_of = {key: new for key, new in renamed.items() if new not in left}
    old_of = {new: key for key, new in new_of.items()}
    there = sorted({*new_of, *old_of})
    for other in others:
        name = other.path.rpartition(".")[2]
        roles = meanings.roles(other.mapping)
        for key in other.mapping:
            role = roles.get(key) or meanings.role_beside(name, key)
            if role is None or not meanings.is_there(role, there):
                continue
            subject = old_of.get(role.subject, role.subject)
            if role.needs_small and not _is_small(state, subject):
                continue
            what = (
                f"{other.path} beside it changes what the weights mean ({_kinds([role])}): "
                f"{listed(other.mapping)}; the base alone is another model"
            )
            return ChangedMeaningError(
                report,
                what,
                where=_where(document, state),
                hint=adding("to take the base alone", "select", state.path),
                options={"select": state.path},
            )
    return None


def _change(roles: Iterable[Role], *, one: bool) -> str:
    if all(role.meaning is meanings.UNKNOWN for role in roles):
        return "may change"
    return "changes" if one else "change"


def _speaks_of(role: Role, there: list[str], gone: list[str]) -> bool:
    """Whether a key may change what is taken.

    So may an update of weights that are called otherwise, unless these are left out as well.
    """
    if meanings.is_there(role, there):
        return True
    return role.meaning is meanings.LORA and not meanings.is_there(role, gone)


def _is_small(state: StateDict, key: str) -> bool:
    """Whether a value has few bits or whole numbers, or is of a packed kind of its own."""
    tensor = as_tensor(state.mapping[key])
    if tensor is None or tensor.dtype.itemsize == 1:
        return True
    return tensor.dtype.name.startswith(("int", "uint"))  # no weights that were trained are these


def _kinds(roles: Iterable[Role]) -> str:
    kinds = dict.fromkeys(role.meaning for role in roles)
    return "; ".join(f"{kind.name}, {kind.what}" for kind in kinds)


def instead(
    document: Document,
    state: StateDict,
    renamed: Mapping[str, str],
    report: Report,
    wanted: str,
) -> ChangedMeaningError | None:
    """The refusal of a file that has what is missing in another form; None: it has nothing of it.

    Whether that can be computed is for the hint to say: of pruned weights it can.
    """
    old_of = {new: key for key, new in renamed.items()}
    roles = meanings.roles([*report.unexpected, *(row.key for row in report.shape_mismatch)])
    lacking = sorted(report.missing)
    differing = {row.key for row in report.shape_mismatch}
    small = {key for key in differing if _is_small(state, old_of[key])}
    told = {
        role.subject
        for role in roles.values()
        if role.subject in (small if role.needs_small else differing)
        or ((role.stands_in or role.param is None) and meanings.is_there(role, lacking))
    }
    if not report.matched and roles and len(roles) == len(renamed):
        told = {role.subject for role in roles.values()}  # an adapter, and nothing but that
    found = {key: role for key, role in roles.items() if role.subject in told}
    if not found:
        return None
    kinds = list(dict.fromkeys(role.meaning for role in found.values()))
    names = [old_of[key] for key in found]
    form = (
        "it holds nothing but"
        if len(found) == len(renamed)
        else "the weights are kept in another form:"
    )
    what = f"{form} {_kinds(found.values())} ({listed(names)})"
    return ChangedMeaningError(
        report,
        f"does not match {wanted}: {what}",
        where=_where(document, state),
        details=describe(report),
        hint=_apply(document) if kinds == [meanings.PRUNING] else Hint(kinds[0].instead),
        options={"apply_masks": True} if kinds == [meanings.PRUNING] else {},
    )


def _apply(document: Document) -> Hint:
    fix = command("fix", document.name, beside(document, "fixed"), apply_masks=True)
    hint = adding("multiply the weights by their masks", "apply-masks")
    return hint._replace(python=f"multiply the weights by their masks: run `{fix}`, and pass")


def _where(document: Document, state: StateDict) -> str:
    return f"{document.name} ({state.path})" if state.selection else document.name
