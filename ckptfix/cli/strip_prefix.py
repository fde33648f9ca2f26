"""`ckptfix strip-prefix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptfix import hints
from ckptfix.cli import options, output, paths, writing
from ckptfix.cli.usage import Misuse
from ckptfix.door import beside
from ckptfix.edit import edits
from ckptfix.errors import KeyCollisionError, KeyMismatchError, PartialPrefixError
from ckptfix.hints import Hint
from ckptfix.keys import wrappers
from ckptfix.match import judge
from ckptfix.match.choose import match
from ckptfix.report import describe
from ckptfix.words import listed

if TYPE_CHECKING:
    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document


@click.command("strip-prefix", cls=paths.Verb)
@writing.edits
@options.target
@options.select_many
@click.option("--prefix", metavar="TEXT", help="Remove this prefix instead, such as model.")
@click.option("--partial", is_flag=True, help="Strip the keys that have it, though others do not.")
def command(
    job: writing.Job,
    model: str | None,
    init: str | None,
    like: str | None,
    select: tuple[str, ...],
    prefix: str | None,
    partial: bool,
) -> int:
    r"""Remove what DataParallel and other wrappers put before keys.

    `module.` and Opacus' `_module.` go where every key of a state dict begins with them;
    `_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module` and `_forward_module` go
    wherever they stand. Everything else in IN is carried along: optimizer, epoch, objects of any
    class. --to or the extension of OUT names its container. With a model, or a checkpoint that
    loads, what goes is what stands between the keys and those of the model; where that alone does
    not make the state dict load, nothing is written.

    \b
    Examples:
      ckptfix strip-prefix ddp.pt plain.pt
      ckptfix strip-prefix ddp.pt plain.pt --model net.py:Net
      ckptfix strip-prefix --in-place ddp.pt
    """
    wanted = options.wanted(model, init, like)
    if wanted is not None and (prefix is not None or partial or len(select) > 1):
        raise Misuse(
            "--model and --like decide what goes: leave out --prefix and --partial, and "
            "give one --select at most"
        )
    document = job.open()
    if wanted is not None:
        given = {"model": model, "init": init, "like": like}
        return _for_target(job, document, wanted, next(iter(select), None), given)
    states = job.states(document, select)
    with job.naming_the_source():
        found = [
            (state, wrappers.strip(state.mapping, prefix=prefix, partial=partial))
            for state in states
        ]
        changes = [(state, renaming) for state, renaming in found if renaming.changed]
        if not changes and prefix is None and not partial:
            _explain(states)
    if not changes:
        what = f"no key begins with {prefix!r}" if prefix else "no key has a wrapper's prefix"
        return job.nothing(what)
    if prefix is None and not partial:
        _say_kept(found)
    return job.finish_renamed(edits.rename(document, changes), changes)


def _for_target(
    job: writing.Job,
    document: Document,
    wanted: Target,
    select: str | None,
    given: dict[str, str | None],
) -> int:
    """Strip what stands between the keys and those of a target, if nothing else does."""
    found = match(document, wanted, select)
    state, way = found.state, found.renaming
    report = judge.as_it_stands(document, state, wanted, way)
    once = _written_once(job, state, way, wanted)
    if once or way.added or not report.loads:
        what = f"to strip prefixes does not make it match {wanted.name}"
        if once:
            what += f": OUT would hold {listed(once)} once, under one name of each"
        out = beside(document, "fixed") if job.output is None else job.output.path
        more = {"select": select, "untie": bool(once), "force": job.force}
        fix = hints.command("fix", job.source, out, **more, **given)
        details = describe(report)
        raise KeyMismatchError(
            report, what, where=document.name, hint=Hint("this does", fix), details=details
        )
    if not way.changed:
        return job.nothing(f"its keys are those of {wanted.name} already")
    return job.finish_renamed(edits.rename(document, [(state, way)]), [(state, way)])


def _written_once(job: writing.Job, state: StateDict, way: Renaming, wanted: Target) -> list[str]:
    """Tied tensors of which the target wants several names, and OUT would have one."""
    if job.output is None or not job.container.tensors_only:
        return []
    groups = ([way.keys[key] for key in keys] for keys in state.ties)
    kept = ([key for key in keys if key in wanted.specs] for keys in groups)
    return [" = ".join(keys) for keys in kept if len(keys) > 1]


def _explain(states: list[StateDict]) -> None:
    """Refuse, where wrappers are there and cannot be stripped: silence would hide them."""
    for state in states:
        seen = wrappers.detect(state.mapping)
        if seen.collision is not None:
            first, second = seen.collision
            raise KeyCollisionError(first, second, second.removeprefix("module."))
        if seen.own_child:
            raise PartialPrefixError("module.", seen.carrying, seen.lacking)


def _say_kept(found: list[tuple[StateDict, Renaming]]) -> None:
    """Name the state dicts whose `module` stays, since only some of their keys have it."""
    for state, renaming in found:
        if not any(new.startswith("module.") for new in renaming.keys.values()):
            continue
        carrying, lacking = wrappers.own_children(state.mapping)
        if carrying:
            where = "" if state.path == "/" else f" in {state.path}"
            total = len(carrying) + len(lacking)
            output.note(
                f"{len(carrying)} of {total} keys keep their 'module.'{where}: "
                f"{lacking[0]!r} has none"
            )
