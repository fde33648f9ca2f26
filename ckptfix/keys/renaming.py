"""What becomes of keys, and of the modules that they belong to.

A *key* names a parameter or buffer (`module.conv.weight`). Its *prefix* is all but the last
component, with the dot that ends it (`module.conv.`, or nothing at the root), as in torch's
`state_dict(prefix=...)`. A *rule* maps prefixes to prefixes. Because a prefix ends in a dot, text
that ends in one matches it by component: `module.` is no part of `mlp_module.` nor of
`module_list.`. Because the last component is never touched, a parameter that is itself called
`module` stays. And the rule that renames keys also renames the module paths in `_metadata`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptfix.errors import KeyCollisionError

Rule = Callable[[str], str]
"""From the prefix of a module to its new prefix."""


@dataclass(frozen=True)
class Renaming:
    """What becomes of each key, and of the modules they belong to."""

    keys: Mapping[str, str]
    """Every old key, in its order, to its new one; no two new ones are equal."""
    rule: Rule = field(compare=False, repr=False)
    """What becomes of a module's prefix."""

    @cached_property
    def changes(self) -> Mapping[str, str]:
        """The keys that get another name, and that name."""
        return {old: new for old, new in self.keys.items() if old != new}

    @property
    def changed(self) -> int:
        """How many keys get another name."""
        return len(self.changes)

    @property
    def removed(self) -> str:
        """The components taken out, such as `module.`; several stretches are joined by commas."""
        return self._stretches[0]

    @property
    def added(self) -> str:
        """The components put in, such as `module.`; several stretches are joined by commas."""
        return self._stretches[1]

    @property
    def label(self) -> str:
        """What was done, for people: `removed module.`, `added model.`, `unchanged`."""
        parts = (("removed", self.removed), ("added", self.added))
        said = ", ".join(f"{verb} {stretch}" for verb, stretch in parts if stretch)
        return said or ("renamed" if self.changed else "unchanged")

    def of_modules(self, paths: Iterable[str]) -> dict[str, str]:
        """The new names of the modules in `_metadata` (`''` is the root), in their order.

        Where a wrapper and what it wraps become one, only the deeper is in the answer: its entry
        is the one to keep, as in torch's `consume_prefix_in_state_dict_if_present`. Nothing else
        is left out. Where a prefix was added, the root moves below it, and a new `''` is for the
        caller to make.
        """
        winners: dict[str, str] = {}
        for old in paths:
            new = self.rule(f"{old}." if old else "").removesuffix(".")
            if new not in winners or depth_of(old) > depth_of(winners[new]):
                winners[new] = old
        return {old: new for new, old in winners.items()}

    def metadata(self, versions: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a `_metadata` under their new paths; added wrappers have version 1."""
        paths = self.of_modules(versions)
        kept = {paths[old]: version for old, version in versions.items() if old in paths}
        above = paths.get("", "").split(".")
        wrappers = {".".join(above[:depth]): {"version": 1} for depth in range(len(above))}
        return {**wrappers, **kept} if paths.get("") else kept

    @cached_property
    def _stretches(self) -> tuple[str, str]:
        """What was removed and what was added, each distinct stretch once."""
        removed: dict[str, None] = {}
        added: dict[str, None] = {}
        for old, new in dict.fromkeys(
            unlike(*_split(*pair)) for pair in _trimmed(self.changes.items())
        ):
            for _, i, i_end, j, j_end in _edits(old, new):
                removed[joined(old[i:i_end])] = None
                added[joined(new[j:j_end])] = None
        return ", ".join(filter(None, removed)), ", ".join(filter(None, added))


def rename(keys: Iterable[str], rule: Rule) -> Renaming:
    """What a rule makes of keys. Raises `KeyCollisionError` where two would become one."""
    return Renaming(without_collisions(renamed_by(keys, rule)), rule)


def by_mapping(keys: Iterable[str], new: Mapping[str, str]) -> Renaming:
    """The renaming of some keys, each to a name of its own; modules stay where they are."""
    return Renaming(without_collisions({key: new.get(key, key) for key in keys}), str)


def unchanged(keys: Iterable[str]) -> Renaming:
    """The renaming that leaves every key and every module as it is."""
    return Renaming({key: key for key in keys}, str)


def renamed_by(keys: Iterable[str], rule: Rule) -> dict[str, str]:
    """Old keys to new, two of which may be equal; the rule is asked once for each prefix."""
    known: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for key in keys:
        prefix = prefix_of(key)
        new = known.get(prefix)
        if new is None:
            new = known[prefix] = rule(prefix)
        renamed[key] = new + key[len(prefix) :]
    return renamed


def first_collision(renamed: Mapping[str, str]) -> tuple[str, str] | None:
    """The first two old keys that have one new key."""
    if len(set(renamed.values())) == len(renamed):
        return None
    owners: dict[str, str] = {}
    for old, new in renamed.items():
        if owners.setdefault(new, old) != old:
            return owners[new], old
    return None


def without_collisions(renamed: dict[str, str]) -> dict[str, str]:
    """The same, once no two keys have become one."""
    if pair := first_collision(renamed):
        raise KeyCollisionError(*pair, renamed[pair[0]])
    return renamed


@dataclass(frozen=True, slots=True)
class Shift:
    """A rule for the start of a prefix, or of a key: one prefix off, another on in its place."""

    strip: str = ""
    add: str = ""

    def __call__(self, text: str) -> str:
        """The text with the one prefix off and the other on, where it has the one."""
        if not text.startswith(self.strip):
            return text
        return self.add + text.removeprefix(self.strip)


def prefix_of(key: str) -> str:
    """All but the last component of a key, which is never empty, with the dot that ends it."""
    return key[: key.rfind(".", 0, -1) + 1]


def dotted(prefix: str) -> str:
    """What a person wrote as a prefix, with the dot that ends it."""
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def components_of(prefix: str) -> tuple[str, ...]:
    """`("a", "b")` of `a.b.`."""
    return tuple(prefix.split(".")[:-1])


def joined(components: Iterable[str]) -> str:
    """`a.b.` of `("a", "b")`."""
    return "".join(f"{component}." for component in components)


def depth_of(path: str) -> int:
    """How many components a module path has; the root has none."""
    return path.count(".") + bool(path)


def shared_start(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """What both begin with; for the least and the greatest of many, what all begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    return first[:end]


def shared_prefix(keys: Iterable[str]) -> tuple[str, ...]:
    """The components of the longest prefix that all keys have; none where there are no keys."""
    prefixes = [components_of(prefix) for prefix in set(map(prefix_of, keys))]
    return shared_start(min(prefixes, default=()), max(prefixes, default=()))


def _trimmed(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], None]:
    """The prefixes of pairs of keys, each once; of keys that only lost their start, that start."""
    return dict.fromkeys(
        (start, "")
        if old.endswith(new) and (start := old[: len(old) - len(new)])[-1:] == "."
        else (prefix_of(old), prefix_of(new))
        for old, new in keys
    )


_Pair = tuple[tuple[str, ...], tuple[str, ...]]


def _split(old: str, new: str) -> _Pair:
    return components_of(old), components_of(new)


def unlike(old: tuple[str, ...], new: tuple[str, ...]) -> _Pair:
    """Two lists of components without what both end with, then without what both begin with."""
    tail = len(shared_start(old[::-1], new[::-1]))
    old, new = old[: len(old) - tail], new[: len(new) - tail]
    head = len(shared_start(old, new))
    return old[head:], new[head:]


def _edits(old: tuple[str, ...], new: tuple[str, ...]) -> list[tuple[str, int, int, int, int]]:
    """Where two lists of components differ, as `difflib` tells it, whose time is their product."""
    if not (old and new) or len(old) * len(new) > _MOST_COMPARED:
        return [("replace", 0, len(old), 0, len(new))]
    from difflib import SequenceMatcher

    edits = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [edit for edit in edits if edit[0] != "equal"]


_MOST_COMPARED = 10_000
"""Pairs of components that are compared; no model is so deep that it has more."""
