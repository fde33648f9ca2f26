"""Names that wrapper modules add to keys: see them, remove them, add them, fit keys to a target.

A *key* names a parameter or buffer (`module.conv.weight`). Its *prefix* is all but the last
component, with the dot that ends it (`module.conv.`, or nothing at the root), as in torch's
`state_dict(prefix=...)`. A *rule* maps prefixes to prefixes. Because a prefix ends in a dot, text
that ends in one matches it by component: `module.` is no part of `mlp_module.` nor of
`module_list.`. Because the last component is never touched, a parameter that is itself called
`module` stays. And the rule that renames keys also renames the module paths in `_metadata`.

Everything here is a pure function of lists of keys; nothing knows of tensors or files.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from functools import partial as bind
from typing import Any, Literal

from ckptfix.errors import KeyCollisionError, PartialPrefixError, RenameError

WRAPPERS: Mapping[str, str] = {
    "module": "nn.DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric or DeepSpeed",
}
"""The components that wrappers add, and the wrapper that adds each."""

ANYWHERE = frozenset(WRAPPERS) - {"module"}
"""Those that nobody calls a child of their own, so that they may be removed wherever they stand."""

Rule = Callable[[str], str]
"""From the prefix of a module to its new prefix."""

Layout = Literal["swa", "ema"]
"""A state dict with a shape of its own: weights averaged by SWA, or EMA weights beside others."""


@dataclass(frozen=True)
class Renaming:
    """What becomes of each key, and of the modules they belong to."""

    keys: Mapping[str, str]
    """Every old key, in its order, to its new one; no two new ones are equal."""
    rule: Rule = field(compare=False, repr=False)
    """What becomes of a module's prefix."""

    @cached_property
    def changed(self) -> int:
        """How many keys get another name."""
        return sum(old != new for old, new in self.keys.items())

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
            if new not in winners or _depth(old) > _depth(winners[new]):
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
        changed = ((old, new) for old, new in self.keys.items() if old != new)
        prefixes = dict.fromkeys((_prefix(old), _prefix(new)) for old, new in changed)
        removed: dict[str, None] = {}
        added: dict[str, None] = {}
        for old, new in dict.fromkeys(_unlike(_split(*pair)) for pair in prefixes):
            for _, i, i_end, j, j_end in _edits(old, new):
                removed[_join(old[i:i_end])] = None
                added[_join(new[j:j_end])] = None
        return ", ".join(filter(None, removed)), ", ".join(filter(None, added))


@dataclass(frozen=True, slots=True)
class Detection:
    """The wrappers that a list of keys tells of."""

    leading: tuple[str, ...]
    """The stack of wrapper components that every key begins with, outermost first."""
    inside: Mapping[str, int]
    """Wrapper components further in, and how many keys hold each; `module` may be a child there."""
    carrying: tuple[str, ...]
    """Keys that begin with `module`, below what all share, where others do not; else none."""
    lacking: tuple[str, ...]
    """Those others; none where `carrying` is empty."""
    collision: tuple[str, str] | None
    """Two keys that would become one without their wrappers."""
    layout: Layout | None
    """`swa`: `module.*` beside `n_averaged`; `ema`: `model_ema.*` beside others; None: plain."""

    @property
    def own_child(self) -> bool:
        """Whether `module` looks like a child that the model has, not like a wrapper."""
        return bool(self.carrying)


def detect(keys: Iterable[str]) -> Detection:
    """See which wrappers the keys tell of. Nothing is decided here, and nothing raised."""
    keys = list(keys)
    leading = _common_wrappers(keys)
    layout = _layout(keys)
    leads, others = _divide(keys)
    carrying, lacking = ((), ()) if layout == "swa" else (leads, others)
    return Detection(
        leading=leading,
        inside=_count_inside(keys, skip=len(_join(leading)), apart=set(map(_prefix, leads))),
        carrying=carrying,
        lacking=lacking,
        collision=_collision(keys, _wrapper_rule(keys, partial=True)),
        layout=layout,
    )


def strip(keys: Iterable[str], *, prefix: str | None = None, partial: bool = False) -> Renaming:
    """Remove wrapper components, or the one prefix that is named.

    Without a prefix, `ANYWHERE` components go wherever they stand, and leading `module`s as far as
    every key has them. With one (`module`, `model.net.`) it goes from the start of the keys, once.
    `partial` removes either from the keys that have it and leaves the others. Where there is
    nothing to strip, nothing is changed.

    Raises:
        PartialPrefixError: only some of the keys carry the prefix that is named.
        KeyCollisionError: two keys would become one.
    """
    keys = list(keys)
    if prefix is None:
        return _rename(keys, _wrapper_rule(keys, partial=partial))
    start = _dotted(prefix)
    carrying = [key for key in keys if _prefix(key).startswith(start)]
    lacking = [key for key in keys if not _prefix(key).startswith(start)]
    if carrying and lacking and not partial:
        raise PartialPrefixError(start, carrying, lacking)
    return _rename(keys, _Shift(strip=start))


def add(keys: Iterable[str], prefix: str = "module.") -> Renaming:
    """Put a prefix, with or without its last dot, before every key."""
    return _rename(keys, _Shift(add=_dotted(prefix)))


def substitute(keys: Iterable[str], pattern: str, replacement: str) -> Renaming:
    """Rename by regular expression, as `re.sub` does, on whole keys.

    A module is renamed where the expression turns its prefix into another prefix.

    Raises:
        RenameError: the pattern or the replacement is not valid.
        KeyCollisionError: two keys would become one.
    """
    return substitute_in_turn(keys, [(pattern, replacement)])


def substitute_in_turn(keys: Iterable[str], pairs: Iterable[tuple[str, str]]) -> Renaming:
    """As `substitute`, with several patterns and replacements, each upon what the last one left."""
    subs = [_substitution(pattern, replacement) for pattern, replacement in pairs]

    def sub(text: str) -> str:
        for substitute_one in subs:
            text = substitute_one(text)
        return text

    def rule(prefix: str) -> str:
        new = sub(prefix)
        return new if not new or new.endswith(".") else prefix

    return Renaming(_without_collisions({key: sub(key) for key in keys}), rule)


def _substitution(pattern: str, replacement: str) -> Rule:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise RenameError(
            f"{pattern!r} is no regular expression: {error}",
            hint=f"to match that text as it stands: {shlex.quote(re.escape(pattern))}",
            code="bad-pattern",
        ) from None
    try:
        expression.sub(replacement, "")
    except (re.error, IndexError) as error:
        raise RenameError(
            f"{replacement!r} is no replacement for {pattern!r}: {error}",
            hint=r"what a group matched is \1, \2, …; a backslash itself is \\",
            code="bad-pattern",
        ) from None
    return bind(expression.sub, replacement)


def fits(keys: Iterable[str], target_keys: Iterable[str]) -> list[Renaming]:
    """All the ways to strip and add prefixes under which the keys are those of the target.

    Where they are so already, that is the only answer. None: nothing fits wholly, see `closest`.
    Wrappers in the target are put where the target has them.
    """
    keys, target = list(keys), dict.fromkeys(target_keys)
    if target.keys() == set(keys):
        return [_rename(keys, _Shift())]
    found = (c for c in _candidates(keys, target) if set(c.keys.values()) == target.keys())
    return _distinct(found, lambda renaming: tuple(renaming.keys.values()))


def closest(keys: Iterable[str], target_keys: Iterable[str]) -> Renaming:
    """The way to strip or add prefixes that matches most of the target; unchanged wins ties."""
    return nearest(keys, target_keys)[0]


def nearest(keys: Iterable[str], target_keys: Iterable[str]) -> list[Renaming]:
    """Like `closest`, with every other choice that matches as many keys of the target.

    Two choices are two only where they take other keys for the target's: a checkpoint with a
    student and a teacher of the same build has two.
    """
    keys, target = list(keys), dict.fromkeys(target_keys)
    unchanged = _rename(keys, _Shift())
    scored = [(len(_matched(c, target)), c) for c in (unchanged, *_candidates(keys, target))]
    best = max(score for score, _ in scored)
    if scored[0][0] == best:
        return [unchanged]
    ties = (renaming for score, renaming in scored if score == best)
    return _distinct(ties, lambda renaming: frozenset(_matched(renaming, target).items()))


# Prefixes and components


def _prefix(key: str) -> str:
    """All but the last component of a key, which is never empty, with the dot that ends it."""
    return key[: key.rfind(".", 0, -1) + 1]


def _dotted(prefix: str) -> str:
    """What a person wrote as a prefix, with the dot that ends it."""
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _components(prefix: str) -> tuple[str, ...]:
    return tuple(prefix.split(".")[:-1])


def _join(components: Iterable[str]) -> str:
    return "".join(f"{component}." for component in components)


def _depth(path: str) -> int:
    """How many components a module path has; the root has none."""
    return path.count(".") + bool(path)


# Rules


@dataclass(frozen=True, slots=True)
class _Shift:
    """A rule for the start of a prefix, or of a key: one prefix off where it is, another on."""

    strip: str = ""
    add: str = ""

    def __call__(self, text: str) -> str:
        return self.add + text.removeprefix(self.strip)


def _same(prefix: str) -> str:
    return prefix


def _without(prefix: str, names: Set[str] = ANYWHERE) -> str:
    """A prefix without certain components."""
    components = _components(prefix)
    if names.isdisjoint(components):
        return prefix
    return _join(part for part in components if part not in names)


def _leading_modules(prefix: str) -> int:
    """How many `module`s a prefix begins with, once what may go anywhere has gone."""
    bare, count = _without(prefix), 0
    while bare.startswith("module.", count * len("module.")):
        count += 1
    return count


def _bare(prefix: str, modules: int | None = None) -> str:
    """A prefix without `ANYWHERE` components and at most so many leading `module`s, or any."""
    leading = _leading_modules(prefix)
    drop = leading if modules is None else min(modules, leading)
    return _without(prefix)[len("module.") * drop :]


def _wrapper_rule(keys: Iterable[str], *, partial: bool) -> Rule:
    """The rule for wrappers: `module` goes as often as every key leads with it.

    With `partial`, as often as every key that leads with it at all.
    """
    counts = {_leading_modules(prefix) for prefix in set(map(_prefix, keys))}
    if partial:
        counts.discard(0)
    return bind(_bare, modules=min(counts, default=0))


def _rename(keys: Iterable[str], rule: Rule) -> Renaming:
    return Renaming(_without_collisions(_renamed(keys, rule)), rule)


def _renamed(keys: Iterable[str], rule: Rule) -> dict[str, str]:
    """Old keys to new, two of which may be equal; the rule is asked once for each prefix."""
    known: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for key in keys:
        prefix = _prefix(key)
        if prefix not in known:
            known[prefix] = rule(prefix)
        renamed[key] = known[prefix] + key[len(prefix) :]
    return renamed


def _first_collision(renamed: Mapping[str, str]) -> tuple[str, str] | None:
    """The first two old keys that have one new key."""
    owners: dict[str, str] = {}
    for old, new in renamed.items():
        if owners.setdefault(new, old) != old:
            return owners[new], old
    return None


def _without_collisions(renamed: dict[str, str]) -> dict[str, str]:
    """The same, once no two keys have become one."""
    if pair := _first_collision(renamed):
        raise KeyCollisionError(*pair, renamed[pair[0]])
    return renamed


# What `detect` looks at


def _common_wrappers(keys: Iterable[str]) -> tuple[str, ...]:
    """The wrapper components that every key begins with."""
    prefixes = [_components(prefix) for prefix in set(map(_prefix, keys))]
    common = _common(min(prefixes, default=()), max(prefixes, default=()))
    others = (i for i, component in enumerate(common) if component not in WRAPPERS)
    return common[: next(others, len(common))]


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """What both begin with; for the least and the greatest of many, what all begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    return first[:end]


def _count_inside(keys: Iterable[str], *, skip: int, apart: Collection[str]) -> dict[str, int]:
    """How many keys hold each wrapper component after so many characters.

    The leading `module` of a prefix in `apart` is told elsewhere and not counted.
    """
    counts: Counter[str] = Counter()
    for prefix, held in Counter(map(_prefix, keys)).items():
        rest = prefix[skip:].removeprefix("module." if prefix in apart else "")
        for name in WRAPPERS.keys() & set(_components(rest)):
            counts[name] += held
    return {name: counts[name] for name in WRAPPERS if counts[name]}


def _divide(keys: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys that lead with more `module`s than all do, and the others; or none at all."""
    counts = {prefix: _leading_modules(prefix) for prefix in set(map(_prefix, keys))}
    shared = min(counts.values(), default=0)
    carrying = tuple(key for key in keys if counts[_prefix(key)] > shared)
    lacking = tuple(key for key in keys if counts[_prefix(key)] == shared)
    return (carrying, lacking) if carrying else ((), ())


def _collision(keys: Iterable[str], rule: Rule) -> tuple[str, str] | None:
    return _first_collision(_renamed(keys, rule))


def _layout(keys: Iterable[str]) -> Layout | None:
    """Whether the keys are those of `AveragedModel`, or hold EMA weights as latent diffusion does.

    Sources: `torch.optim.swa_utils.AveragedModel`; `LitEma` of CompVis/latent-diffusion, which
    keeps its averages, their dots removed, under `model_ema`.
    """
    bare = _renamed(keys, _without).values()
    if len(bare) > 1 and [k for k in bare if not k.startswith("module.")] == ["n_averaged"]:
        return "swa"
    ema = sum(key.startswith("model_ema.") for key in bare)
    return "ema" if 0 < ema < len(bare) else None


# What `fits` and `nearest` try


_FORMS: tuple[Rule, ...] = (_same, _without, _bare, bind(_without, names=WRAPPERS.keys()))
"""Ways to write keys without wrappers, gentlest first. Keys fit where they are equal in one."""


def _candidates(keys: Iterable[str], target: Iterable[str]) -> Iterator[Renaming]:
    """Every renaming worth a look, gentlest first: keys and target in each form, and shifted.

    Forms and shifts under which two keys would become one are passed over.
    """
    seen: list[tuple[dict[str, str], dict[str, str]]] = []
    for form in _FORMS:
        forms = _renamed(keys, form), _renamed(target, form)
        if forms in seen or any(map(_first_collision, forms)):
            continue
        seen.append(forms)
        rule_of = _module_rules(forms[1], form)
        for shift in _shifts(forms[0].values(), forms[1].values()):
            with suppress(KeyCollisionError):
                yield Renaming(_through(*forms, shift), rule_of(shift))


def _through(source: Mapping[str, str], target: Mapping[str, str], shift: _Shift) -> dict[str, str]:
    """Each key as the target writes it; one that the target lacks, in the form they share."""
    written = {form: key for key, form in target.items()}
    shifted = {old: shift(form) for old, form in source.items()}
    return _without_collisions({old: written.get(form, form) for old, form in shifted.items()})


def _module_rules(target: Mapping[str, str], form: Rule) -> Callable[[_Shift], Rule]:
    """For each shift, the rule that writes a prefix as the target does, where it has the module.

    Of a wrapper and what it wraps, which have one form, the latter is meant.
    """
    written: dict[str, str] = {}
    if any(key != shared for key, shared in target.items()):
        prefixes = {key[: i + 1] for key in target for i, c in enumerate(key) if c == "."}
        written = {form(prefix): prefix for prefix in sorted(prefixes, key=_depth)}

    def write(shift: _Shift, prefix: str) -> str:
        shifted = shift(form(prefix))
        return written.get(shifted, shifted)

    return lambda shift: bind(write, shift)


def _shifts(source: Iterable[str], target: Iterable[str]) -> Iterator[_Shift]:
    """No shift; and each leading prefix without which, or with which, many keys are the target's.

    "Many" is half of the smaller side. Fewer would be chance: most models have an `fc.weight`.
    """
    yield _Shift()
    ours, theirs = set(source), set(target)
    if ours != theirs:
        many = min(len(ours), len(theirs)) / 2
        yield from (_Shift(strip=prefix) for prefix in _surplus(ours, theirs, many))
        yield from (_Shift(add=prefix) for prefix in _surplus(theirs, ours, many))


def _surplus(longer: Collection[str], shorter: Collection[str], many: float) -> list[str]:
    """Prefixes without which many keys of one side are keys of the other, most first.

    Where that is so for every key, one prefix settles it.
    """
    votes: Counter[str] = Counter()
    for key in longer:
        votes.update(prefix for prefix, rest in _splits(key) if rest in shorter)
    settled = [prefix for prefix, count in votes.items() if count == len(longer)]
    popular = (prefix for prefix, count in votes.items() if count >= many)
    return settled or sorted(popular, key=lambda prefix: (-votes[prefix], prefix))


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Every leading prefix of a key, with what follows it."""
    start = key.find(".") + 1
    while start:
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


# What `Renaming` says of itself


_Pair = tuple[tuple[str, ...], tuple[str, ...]]


def _split(old: str, new: str) -> _Pair:
    return _components(old), _components(new)


def _unlike(pair: _Pair) -> _Pair:
    """Two lists of components without what both end with, then without what both begin with."""
    old, new = pair
    tail = len(_common(old[::-1], new[::-1]))
    old, new = old[: len(old) - tail], new[: len(new) - tail]
    head = len(_common(old, new))
    return old[head:], new[head:]


def _edits(old: tuple[str, ...], new: tuple[str, ...]) -> list[tuple[str, int, int, int, int]]:
    """Where two lists of components differ, as `difflib` tells it."""
    edits = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [edit for edit in edits if edit[0] != "equal"]
