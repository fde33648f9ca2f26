"""One rule that renames what a target lacks: named only where nothing else could be meant.

A rule puts some components of a key in the place of others, such as `weight` in that of `gamma`,
or inserts or removes some. It is offered where every key of the file that it changes is one that
the target does not want, and becomes one that it lacks, of the same shape; where the keys that are
there already stay, and it stays where it was among those like it; and where no other rule that does
as much makes those keys of other ones. How alike two names are plays no part, but for one that is
misspelt.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.specs import specs
from ckptfix.door import beside
from ckptfix.errors import RenameError
from ckptfix.hints import Hint, command
from ckptfix.keys import meanings, prefixes, wrappers
from ckptfix.keys.renaming import shared_start, unlike
from ckptfix.words import FEW, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.target import Target
    from ckptfix.report import Report, Spec
    from ckptfix.tree.document import Document

_CONVENTIONS = frozenset({("gamma", "weight"), ("beta", "bias")})
"""What TensorFlow calls the parameters of a norm, and torch."""

_MOST_RULES = 50
"""Rules at most that are tried for one key; where there are more, names tell nothing."""


class Rule(NamedTuple):
    """A substitution, and what it makes of keys as they stand in the file."""

    pattern: str
    replacement: str
    pairs: Mapping[str, str]
    """Each key that it changes, and the key of the target that it becomes."""


def hint(
    document: Document, state: StateDict, renaming: Renaming, report: Report, wanted: Target
) -> Hint | None:
    """The command that renames keys to those which are missing; None: nothing is certain."""
    if state.origin is not None:
        return None
    search = _Search(state, renaming, report, wanted)
    for key in report.missing[:FEW]:
        rule = search.rule_for(key)
        if rule is not None:
            old, new = next(iter(rule.pairs.items()))
            rename = command(
                "rename",
                document.name,
                beside(document, "renamed"),
                sub=(rule.pattern, rule.replacement),
                select=state.selection,
            )
            return Hint(f"if {old!r} is meant for {new!r}{search.unseen(rule)}", rename)
    return None


_Around = tuple[tuple[str, ...], tuple[str, ...]]
"""The components of a key before and behind some of it."""


class _Search:
    """Everything that is known of the keys of one file and one target."""

    def __init__(
        self, state: StateDict, renaming: Renaming, report: Report, wanted: Target
    ) -> None:
        self.wanted = wanted.specs_for(state)
        self.found = specs(state.mapping)
        self.keys = list(state.mapping)
        self.renamed = renaming.keys
        self.old_of = {new: old for old, new in renaming.keys.items()}
        self.missing = dict.fromkeys(report.missing)
        self.taken = [key for key in self.old_of if key in self.wanted]
        self.at_in_file = {new: at for at, new in enumerate(self.old_of)}
        self.at_in_target = {key: at for at, key in enumerate(self.wanted)}
        self._twins: dict[tuple[int, int, int], dict[_Around, list[str]]] = {}
        roles = meanings.roles(report.unexpected)
        self.unused = {
            self.old_of[key]: key
            for key in report.unexpected
            if key not in roles or roles[key].needs_small
        }

    def rule_for(self, key: str) -> Rule | None:
        """The only rule that makes a missing key of one that is there."""
        rules = _widest(self._making(key))
        if len(rules) != 1:
            known = [rule for rule in rules if self._is_convention(rule)]
            return known[0] if len(known) == 1 else None
        (rule,) = rules
        if self._is_convention(rule):
            return rule
        for old in list(rule.pairs)[:FEW]:
            others = _widest([rule, *self._made_of(old)])
            if any(other.pairs != rule.pairs for other in others):
                return None
        return rule

    def _making(self, key: str) -> list[Rule]:
        return self._distinct((old, key) for old in self.unused)

    def _made_of(self, old: str) -> list[Rule]:
        return self._distinct((old, key) for key in self.missing)

    def _distinct(self, pairs: Iterable[tuple[str, str]]) -> list[Rule]:
        """The rules that hold, of which the first keys are such pairs, each once."""
        found: dict[frozenset[tuple[str, str]], Rule] = {}
        tried: set[tuple[str, str]] = set()
        for old, new in pairs:
            if not _is_same(self.found[old], self.wanted[new]):
                continue
            for substitution in _substitutions(old, self.unused[old], new):
                if substitution in tried:
                    continue
                tried.add(substitution)
                if len(tried) > _MOST_RULES:
                    return []
                rule = self._tried(*substitution)
                if rule is not None:
                    found.setdefault(frozenset(rule.pairs.items()), rule)
                    break
        return list(found.values())

    def _tried(self, pattern: str, replacement: str) -> Rule | None:
        """The rule, where it does nothing but make missing keys of such as nobody wants."""
        try:
            made = wrappers.substitute(self.keys, pattern, replacement)
        except RenameError:
            return None
        changed = made.changes
        if not 0 < len(changed) <= len(self.missing) or not changed.keys() <= self.unused.keys():
            return None
        way = self._way(list(made.keys.values()))
        if way is None:
            return None
        pairs = {old: way.get(new, new) for old, new in changed.items()}
        for old, new in pairs.items():
            if new not in self.missing or not _is_same(self.found[old], self.wanted[new]):
                return None
        there = (key for key in self.keys if self.renamed.get(key) in self.wanted)
        if any(way.get(key) != self.renamed[key] for key in there):
            return None
        if not all(self._keeps_order(old, new) for old, new in pairs.items()):
            return None
        return Rule(pattern, replacement, pairs)

    def _keeps_order(self, old: str, new: str) -> bool:
        """Whether a key stays where it is among those like it that are taken as they are.

        Where layers are numbered from 1 in the file and from 0 in the model, all but one fit, and
        the last would become the first: then all of them are others.
        """
        ours, theirs = self.unused[old].split("."), new.split(".")
        gone, come = unlike(tuple(ours), tuple(theirs))
        if not gone or len(gone) != len(come):
            return True
        start = len(shared_start(tuple(ours), tuple(theirs)))
        place = (start, start + len(gone), len(ours))
        if place not in self._twins:
            self._twins[place] = self._by_place(*place)
        around = (tuple(ours[:start]), tuple(ours[start + len(gone) :]))
        for twin in self._twins[place].get(around, ()):
            if self.wanted[twin].shape != self.wanted[new].shape:
                continue
            before = _is_before(self.unused[old], twin, self.at_in_file)
            if before != _is_before(new, twin, self.at_in_target):
                return False
        return True

    def _by_place(self, start: int, end: int, length: int) -> dict[_Around, list[str]]:
        """Keys that are taken as they are, by all their components but some."""
        found: dict[_Around, list[str]] = {}
        for key in self.taken:
            parts = tuple(key.split("."))
            if len(parts) == length:
                found.setdefault((parts[:start], parts[end:]), []).append(key)
        return found

    def _way(self, keys: list[str]) -> Mapping[str, str] | None:
        """What the target calls keys, as it would be found after the rule was applied."""
        ways = prefixes.nearest(keys, self.wanted)
        return ways[0].keys if len(ways) == 1 else None

    def _is_convention(self, rule: Rule) -> bool:
        lasts = {(meanings.last_of(old), meanings.last_of(new)) for old, new in rule.pairs.items()}
        return lasts <= _CONVENTIONS

    def unseen(self, rule: Rule) -> str:
        """What to say where a weight may be transposed, and nobody would see it."""
        square = [
            old
            for old, new in rule.pairs.items()
            if _is_square(self.found[old]) and _is_of_another_layer(self.unused[old], new)
        ]
        if not square:
            return ""
        return f" and is not its transpose, which a square weight does not tell ({listed(square)})"


def _is_before(one: str, other: str, at: Mapping[str, int]) -> bool:
    """Whether a key comes before another: by their numbers, if these are all that differs."""
    if _NUMBER.sub("0", one) == _NUMBER.sub("0", other):
        return [*map(int, _NUMBER.findall(one))] < [*map(int, _NUMBER.findall(other))]
    return at[one] < at[other]


_NUMBER = re.compile("[0-9]+")


def _widest(rules: list[Rule]) -> list[Rule]:
    """Without rules that are for a part of what another one does: of `0` to `1` in `a.0`, `a.1`."""
    return [rule for rule in rules if not any(_does_more(other, rule) for other in rules)]


def _does_more(one: Rule, other: Rule) -> bool:
    mine, others = one.pairs, other.pairs
    return mine.keys() > others.keys() and set(mine.values()) > set(others.values())


def _is_same(found: Spec, wanted: Spec) -> bool:
    return found.shape is not None and found.shape == wanted.shape


def _is_square(spec: Spec) -> bool:
    return spec.shape is not None and len(spec.shape) == 2 and len(set(spec.shape)) == 1


def _is_of_another_layer(old: str, new: str) -> bool:
    """Whether a weight has another name, or stands a module deeper in its layer, or less deep."""
    ours, theirs = tuple(old.split(".")), tuple(new.split("."))
    gone, come = unlike(ours, theirs)
    tail = len(shared_start(ours[::-1], theirs[::-1]))
    return tail == 0 or (tail == 1 and not (gone and come))


def _substitutions(old: str, written: str, new: str) -> Iterator[tuple[str, str]]:
    """Substitutions that make `new` of `old`, which changes what is unlike in `written` and `new`.

    From the widest on, which any key fits that has those components, to that of one module.
    """
    ours, theirs = tuple(written.split(".")), tuple(new.split("."))
    gone, come = unlike(ours, theirs)
    tail = ours[len(ours) - len(shared_start(ours[::-1], theirs[::-1])) :]
    if not old.endswith(".".join([*gone, *tail])) or not (tail or _is_alike(gone, come)):
        return
    parts = tuple(old.split("."))
    before = parts[: len(parts) - len(gone) - len(tail)]
    for after in ((),) if gone else ((), tail[:1]):  # what is put in stands behind, or before
        for count in range(len(before) + 1):
            context = before[len(before) - count :]
            if not (gone or after or context):
                continue
            start = "^" if count == len(before) else r"(^|\.)"
            end = "$" if len(after) == len(tail) else r"\."
            pattern = r"\.".join(map(re.escape, (*context, *gone, *after)))
            replacement = ".".join((*context, *come, *after)).replace("\\", r"\\")
            if not replacement:  # all of it goes, and the dot behind it
                yield (start + pattern + end, "" if start == "^" else r"\g<1>")
            else:
                front = "" if start == "^" else r"\g<1>"
                yield (start + pattern + end, front + replacement + ("" if end == "$" else "."))


def _is_alike(gone: tuple[str, ...], come: tuple[str, ...]) -> bool:
    """Whether one parameter may be called as another: by convention, or by a slip of the pen."""
    if len(gone) != 1 or len(come) != 1:
        return False
    (old,), (new,) = gone, come
    if (old, new) in _CONVENTIONS:
        return True
    known = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    return old not in known and difflib.SequenceMatcher(None, old, new).ratio() >= _NEAR


_NEAR = 0.75
