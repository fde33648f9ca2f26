"""Arguments and options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptfix.cli import output, paths, reading
from ckptfix.cli.usage import Misuse
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def as_json(function: _Function) -> _Function:
    """`--json`: the answer, and errors too, as JSON."""
    option = click.option(
        "--json",
        is_flag=True,
        is_eager=True,  # so that errors in the other options come as JSON
        expose_value=False,
        callback=_answer_in_json,
        help="Answer in JSON, a line for each file: docs/json.md has the fields.",
    )
    return option(function)


def _answer_in_json(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    context.find_root().ensure_object(output.Form).is_json = wanted


def select(function: _Function) -> _Function:
    """`--select PATH`: which of several state dicts."""
    option = click.option(
        "--select", metavar="PATH", help="The state dict to take, such as model_state_dict."
    )
    return option(function)


def average(function: _Function) -> _Function:
    """`--average`: the averages of the weights instead of the weights."""
    option = click.option(
        "--average", is_flag=True, help="Take the averages of the weights (EMA, SWA) instead."
    )
    return option(function)


def averages(document: Document, select: str | None) -> tuple[Document, str]:
    """What `--average` means: a document, and the path in it at which the averages stand."""
    from ckptfix.edit.averages import take

    taken = take(document, select)
    output.note(f"{document.name}: taking the averages at {taken.place}")
    return taken.document, taken.path


def say_averages(document: Document) -> None:
    """Name the averages that are not taken."""
    from ckptfix.edit.averages import places

    found = places(document)
    if found:
        take = "--average takes them" if len(found) == 1 else "--select takes one of them"
        output.note(f"{document.name}: averages are not taken: {listed(found, 8)}; {take}")


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
            type=paths.Read(),
            help="Another checkpoint, or the JSON of inspect.",
        ),
        click.option(
            "--init", metavar="JSON", help="Arguments of the model, such as '{\"layers\": 3}'."
        ),
        click.option(
            "--model",
            metavar="M",
            type=paths.Code(),
            help="A model: FILE.py:NAME or package.module:NAME (a class, a function that returns "
            "a model, or a model), or hf:FOLDER, by the config.json there.",
        ),
    ):
        function = decorate(function)
    return function


def wanted(model: str | None, init: str | None, like: str | None) -> Target | None:
    """The target that `--model`, `--init` and `--like` name, if any. Raises `TargetError`."""
    if model is not None and like is not None:
        raise Misuse("--model and --like: give one of them")
    if init is not None and model is None:
        raise Misuse("--init is for --model, which is not given")
    if model is None and like is None:
        return None

    from ckptfix.match import target as targets

    if model is not None:
        return targets.of_reference(model, init, output.note)
    if like is None:
        return None
    found = targets.of_file(like)
    reading.say_notes(found.notes)
    return found


def drop(function: _Function) -> _Function:
    """`--drop GLOB`: keys that are left out, each by a pattern of the whole key."""
    option = click.option(
        "--drop",
        metavar="GLOB",
        multiple=True,
        help="Leave out the keys that match as a whole, such as '*lora_*' (may be repeated).",
    )
    return option(function)


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
            self.fail(f"{value!r} is not a size, such as 5GB, 200MB or 1000000", param, ctx)
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
