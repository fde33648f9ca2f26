"""The command line: one group, one file a verb, one place where errors end.

A command is imported when it is called, so that `--help` and small commands start at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import NoReturn

import click

from ckptfix.cli import output
from ckptfix.errors import CkptfixError

COMMANDS = {
    "inspect": "Show what is in a checkpoint, and what is wrong with it.",
    "check": "Say whether a checkpoint is sound, and whether it fits a model.",
    "strip-prefix": "Remove what DataParallel and other wrappers put before keys.",
    "add-prefix": "Put `module.` or another prefix before keys.",
    "to-cpu": "Tag every storage `cpu`, so that it loads without a GPU.",
    "convert": "Write a checkpoint in another container.",
}


class _Verbs(click.Group):
    """A group that knows its commands by name, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ckptfix.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ckptfix", message="%(prog)s %(version)s")
def group() -> None:
    r"""Convert and repair PyTorch checkpoints, without running or loading them.

    \b
      ckptfix inspect model.pt
      ckptfix strip-prefix model.pt fixed.pt
      ckptfix to-cpu model.pt fixed.pt

    Exit codes: 0 done, or the answer is yes; 1 the answer is no, or there was nothing to do; 2 it
    could not be done, and nothing was written.
    """


def main() -> NoReturn:
    """Run the command line and exit. Bad input ends in `error:` and `hint:`, not in a traceback."""
    gc.disable()  # a command makes no garbage to speak of, and large trees are slow to scan
    output.start(sys.argv[1:])
    try:
        code = group.main(prog_name="ckptfix", standalone_mode=False) or 0
    except CkptfixError as error:
        code = output.error(error.message, error.hint, error.slug)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "ckptfix"
        code = output.error(error.format_message(), f"see how it is used: {path} --help", "usage")
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = output.error("interrupted", None, "interrupted", exit_code=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as a shell reports a program that SIGPIPE ended
    except Exception as error:  # noqa: BLE001 - the last net under everything
        code = output.bug(error)
    sys.exit(code)
