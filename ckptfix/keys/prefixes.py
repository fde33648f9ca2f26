"""Fit the keys of a state dict to those of a target, by stripping and adding prefixes.

Every way is looked for under which the keys are the target's; that there are two is for the caller
to refuse. Pure functions of lists of keys, linear in their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial as bind
from itertools import product
from typing import TYPE_CHECKING

from ckptfix.errors import KeyCollisionError
from ckptfix.keys.renaming import (
    Renaming,
    Rule,
    Shift,
    depth_of,
    first_collision,
    joined,
    prefix_of,
    renamed_by,
    shared_prefix,
    unchanged,
    without_collisions,
)
from ckptfix.keys.wrappers import WRAPPERS, bare_prefix, without_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


def fits(keys: Iterable[str], target_keys: Iterable[str]) -> list[Renaming]:
    """All the ways to strip and add prefixes under which the keys are those of the target.

    Where they are so already, that is the only answer. None: nothing fits wholly, see `closest`.
    Wrappers in the target are put where the target has them.
    """
    keys, target = list(keys), dict.fromkeys(target_keys)
    if target.keys() == set(keys):
        return [unchanged(keys)]
    candidates = _candidates(keys, target, _shifts)
    found = (c for c in candidates if set(c.keys.values()) == target.keys())
    return _distinct(found, lambda renaming: tuple(renaming.keys.values()))


def closest(keys: Iterable[str], target_keys: Iterable[str]) -> Renaming:
    """The way to strip or add prefixes that matches most of the target; unchanged wins ties."""
    return nearest(keys, target_keys)[0]


def nearest(keys: Iterable[str], target_keys: Iterable[str]) -> list[Renaming]:
    """Like `closest`, with every other choice that matches as many keys of the target."""
    target = dict.fromkeys(target_keys)
    scored = [(len(_matched(way, target)), way) for way in ways(keys, target)]
    best = max(score for score, _ in scored)
    if scored[0][0] == best:
        return [scored[0][1]]  # keys as they are
    return [way for score, way in scored if score == best]


def ways(
    keys: Iterable[str], target_keys: Iterable[str], *, exchange: bool = False
) -> list[Renaming]:
    """Every renaming worth a look: keys as they are, then without or with a prefix.

    With `exchange`, instead with another prefix in the place of one. Two are two only where they
    take other keys for the target's: a checkpoint with a student and a teacher of one build has
    two.
    """
    keys, target = list(keys), dict.fromkeys(target_keys)
    if target.keys() == set(keys):
        return [unchanged(keys)]
    candidates = _candidates(keys, target, _exchanges if exchange else _shifts)
    found = (unchanged(keys), *candidates)
    return _distinct(found, lambda way: frozenset(_matched(way, target).items()))


def _same(prefix: str) -> str:
    return prefix


_FORMS: tuple[Rule, ...] = (
    _same,
    without_names,
    bare_prefix,
    bind(without_names, names=WRAPPERS.keys()),
)
"""Ways to write keys without wrappers, gentlest first. Keys fit where they are equal in one."""


def _without_parametrization(key: str) -> str:
    """The key of a weight under `parametrizations.weight_norm`, as `utils.weight_norm` calls it.

    torch itself takes the old names where a model has the new ones, and not the other way round.
    """
    key = re.sub(r"\bparametrizations\.(\w+)\.original0$", r"\1_g", key)
    return re.sub(r"\bparametrizations\.(\w+)\.original1$", r"\1_v", key)


def _candidates(
    keys: Collection[str], target: Collection[str], shifts: _Shifts
) -> Iterator[Renaming]:
    """Renamings, gentlest first: keys and target in each form, and shifted.

    Forms and shifts under which two keys would become one are passed over.
    """
    seen: list[tuple[dict[str, str], dict[str, str]]] = []
    spellings: list[Rule] = [_same]
    if any(".original0" in key for key in (*keys, *target)):
        spellings.append(_without_parametrization)
    for spell, form in product(spellings, _FORMS):
        forms = _written(keys, spell, form), _written(target, spell, form)
        if forms in seen or any(map(first_collision, forms)):
            continue
        seen.append(forms)
        rule_of = _module_rules(forms[1], form)
        for shift in shifts(forms[0].values(), forms[1].values()):
            with suppress(KeyCollisionError):
                yield Renaming(_through(*forms, shift), rule_of(shift))


def _written(keys: Iterable[str], spell: Rule, form: Rule) -> dict[str, str]:
    """Each key in a form, and spelled so."""
    if spell is _same:
        return renamed_by(keys, form)
    spelled = {key: spell(key) for key in keys}
    in_form = renamed_by(spelled.values(), form)
    return {key: in_form[name] for key, name in spelled.items()}


def _through(source: Mapping[str, str], target: Mapping[str, str], shift: Shift) -> dict[str, str]:
    """Each key as the target writes it; one that the target lacks, in the form they share."""
    written = {form: key for key, form in target.items()}
    shifted = {old: shift(form) for old, form in source.items()}
    return without_collisions({old: written.get(form, form) for old, form in shifted.items()})


def _module_rules(target: Mapping[str, str], form: Rule) -> Callable[[Shift], Rule]:
    """For each shift, the rule that writes a prefix as the target does, where it has the module.

    Of a wrapper and what it wraps, which have one form, the latter is meant.
    """
    written: dict[str, str] = {}
    if any(key != shared for key, shared in target.items()):
        deep = (key for key in target if key.count(".") <= _DEEPEST)
        prefixes = {key[: i + 1] for key in deep for i, c in enumerate(key) if c == "."}
        written = {form(prefix): prefix for prefix in sorted(prefixes, key=depth_of)}

    def write(shift: Shift, prefix: str) -> str:
        shifted = shift(form(prefix))
        return written.get(shifted, shifted)

    return lambda shift: bind(write, shift)


_DEEPEST = 100
"""Modules in modules at most that are looked at one by one: a key may be nothing but dots."""


def _shifts(source: Iterable[str], target: Iterable[str]) -> Iterator[Shift]:
    """No shift; and each leading prefix without which, or with which, many keys are the target's.

    "Many" is half of the smaller side. Fewer would be chance: most models have an `fc.weight`.
    """
    yield Shift()
    ours, theirs = set(source), set(target)
    if ours != theirs:
        many = min(len(ours), len(theirs)) / 2
        yield from (Shift(strip=prefix) for prefix in _surplus(ours, theirs, many))
        yield from (Shift(add=prefix) for prefix in _surplus(theirs, ours, many))


def _exchanges(source: Iterable[str], target: Iterable[str]) -> Iterator[Shift]:
    """What all keys of the target begin with, put in the place of what many keys begin with.

    Both have to hold several modules: a layer of another name is no prefix.
    """
    ours, common = set(source), shared_prefix(target)
    for depth in range(1, min(len(common), _DEEPEST) + 1):
        prefix = joined(common[:depth])
        bare = {key.removeprefix(prefix) for key in target}
        if len(set(map(prefix_of, bare))) > 1:
            yield from (Shift(strip, prefix) for strip in _surplus(ours, bare, len(bare) / 2))


_Shifts = Callable[[Iterable[str], Iterable[str]], Iterable[Shift]]
"""What to try on the keys of a file, given the keys of a target."""


def _surplus(longer: Collection[str], shorter: Collection[str], many: float) -> list[str]:
    """Prefixes without which many keys of one side are keys of the other, most first.

    Where that is so for every key, one prefix settles it. There are so many at most that trying
    them takes no longer than a second or two: thousands of layers called alike tell nothing.
    """
    votes: Counter[str] = Counter()
    lengths = set(map(len, shorter))
    for key in longer:
        votes.update(prefix for prefix, rest in _splits(key, lengths) if rest in shorter)
    settled = [prefix for prefix, count in votes.items() if count == len(longer)]
    popular = (prefix for prefix, count in votes.items() if count >= many)
    most = max(_FEW_WAYS, _MOST_KEYS // max(len(longer), 1))
    return settled or sorted(popular, key=lambda prefix: (-votes[prefix], prefix))[:most]


_FEW_WAYS, _MOST_KEYS = 20, 2_000_000
"""Prefixes that are tried in any case, and keys at most that are renamed to try others."""


def _splits(key: str, lengths: Collection[int]) -> Iterator[tuple[str, str]]:
    """The leading prefixes of a key, with what follows each, where that has one of some lengths.

    Only those are cut out: a key may have as many dots as characters.
    """
    start = key.find(".") + 1
    while start:
        if len(key) - start in lengths:
            yield key[:start], key[start:]
        start = key.find(".", start) + 1


def _matched(renaming: Renaming, target: Collection[str]) -> dict[str, str]:
    """The part of a renaming that ends in keys of the target."""
    return {old: new for old, new in renaming.keys.items() if new in target}


def _distinct(renamings: Iterable[Renaming], key: Callable[[Renaming], object]) -> list[Renaming]:
    """The first of those that are alike by `key`."""
    first: dict[object, Renaming] = {}
    for renaming in renamings:
        first.setdefault(key(renaming), renaming)
    return list(first.values())
