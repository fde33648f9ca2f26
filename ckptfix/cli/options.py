"""Arguments and options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

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


def writes(function: _Function) -> _Function:
    """`IN OUT --force --dry-run --json`: what every command that writes a file takes."""
    for decorate in (
        as_json,
        click.option(
            "--dry-run", "-n", is_flag=True, help="Say what would be done; write nothing."
        ),
        click.option("--force", "-f", is_flag=True, help="Replace OUT if it is there."),
        click.argument("target", metavar="OUT", type=click.Path()),
        click.argument("source", metavar="IN", type=click.Path()),
    ):
        function = decorate(function)
    return function
