"""Arguments and options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ckptfix import door
from ckptfix.cli import reading
from ckptfix.formats.table import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfix.match.target import Target

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def as_json(function: _Function) -> _Function:
    """`--json`: the answer, and errors too, as JSON."""
    option = click.option(
        "--json", "_json", is_flag=True, expose_value=False, help="Answer in JSON."
    )
    return option(function)


def select(function: _Function) -> _Function:
    """`--select PATH`: which of several state dicts."""
    option = click.option(
        "--select", metavar="PATH", help="The state dict to take, such as model_state_dict."
    )
    return option(function)


def select_many(function: _Function) -> _Function:
    """`--select PATH`, which may be repeated."""
    option = click.option(
        "--select",
        metavar="PATH",
        multiple=True,
        help="Only this state dict, such as model_state_dict (may be repeated).",
    )
    return option(function)


def target(function: _Function) -> _Function:
    """`--model M --init JSON --like FILE2`: what to hold a checkpoint against."""
    for decorate in (
        click.option(
            "--like",
            metavar="FILE2",
            type=click.Path(),
            help="Another checkpoint, or the JSON of inspect.",
        ),
        click.option(
            "--init", metavar="JSON", help="Arguments of the model, such as '{\"layers\": 3}'."
        ),
        click.option("--model", metavar="M", help="A model: FILE.py:NAME or package.module:NAME."),
    ):
        function = decorate(function)
    return function


def wanted(model: str | None, init: str | None, like: str | None) -> Target | None:
    """The target that `--model`, `--init` and `--like` name, if any. Raises `TargetError`."""
    if model is not None and like is not None:
        raise click.UsageError("--model and --like: give one of them")
    if init is not None and model is None:
        raise click.UsageError("--init: is for --model, which is not given")
    if model is None and like is None:
        return None

    from ckptfix.match import target as targets

    if model is not None:
        return targets.of_reference(model, init)
    if like is None:
        return None
    found = targets.of_file(like)
    reading.say_notes(found.notes)
    return found


_DRY_RUN = click.option(
    "--dry-run", "-n", is_flag=True, help="Say what would be done; write nothing."
)
_FORCE = click.option("--force", "-f", is_flag=True, help="Replace OUT if it is there.")
_IN = click.argument("source", metavar="IN", type=click.Path())


def writes(function: _Function) -> _Function:
    """`IN OUT --force --dry-run --json`: what every command that writes a file takes."""
    out = click.argument("target", metavar="OUT", type=click.Path())
    for decorate in (as_json, _DRY_RUN, _FORCE, out, _IN):
        function = decorate(function)
    return function


def edits(function: _Function) -> _Function:
    """As `writes`, or `--in-place IN` without OUT: then the target is IN."""

    @functools.wraps(function)
    def checked(*, source: str, target: str | None, in_place: bool, **others: Any) -> Any:
        if in_place and target is not None:
            raise click.UsageError("OUT and --in-place: give one of them")
        if not in_place and target is None:
            raise click.UsageError("OUT is missing; to change IN itself, add --in-place")
        target = source if in_place else target
        return function(source=source, target=target, in_place=in_place, **others)

    out = click.argument("target", metavar="[OUT]", required=False, type=click.Path())
    flag = click.option("--in-place", is_flag=True, help="Change IN itself; no OUT is written.")
    decorated: Any = checked
    for decorate in (as_json, _DRY_RUN, _FORCE, flag, out, _IN):
        decorated = decorate(decorated)
    return cast("_Function", decorated)


_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


class _Size(click.ParamType[int]):
    """Bytes: `5GB`, `200 MB`, `1.5GiB`, or a plain number."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", value.strip(), re.ASCII)
        unit = _UNITS.get(found[2].upper()) if found else None
        count = int(float(found[1]) * unit) if found and unit else 0
        if count < 1:
            self.fail(f"{value!r} is no size, such as 5GB, 200MB or 1000000", param, ctx)
        return count


def max_shard_size(function: _Function) -> _Function:
    """`--max-shard-size SIZE`, in bytes or None."""
    option = click.option(
        "--max-shard-size",
        type=_Size(),
        help="Write a folder, of files with this much in each: 2GB, 200MB, or bytes (5GB if OUT "
        "is a folder and this is not given).",
    )
    return option(function)


def as_folder(target: str) -> str:
    """An output path as a folder. Raises a usage error where it is named like a file."""
    if door.is_folder(target):
        return target
    if target.lower().endswith(EXTENSIONS):
        raise click.BadParameter(
            f"{target} is named like a file, and shards want a folder: give {target}/",
            param_hint="OUT",
        )
    return f"{target}/"
