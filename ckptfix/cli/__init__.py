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
from ckptfix.cli.usage import Misuse, hint_for
from ckptfix.errors import CkptfixError
from ckptfix.hints import Hint, command, shell

COMMANDS = {
    "inspect": "Show what is in a checkpoint, and what is wrong with it.",
    "check": "Say whether a checkpoint is sound, and whether it fits a model.",
    "fix": "Find what is wrong, and repair it, for a model if you name one.",
    "recover": "Save what can be saved from a damaged checkpoint.",
    "explain": "Say what an error means, and which command repairs it.",
    "strip-prefix": "Remove what DataParallel and other wrappers put before keys.",
    "add-prefix": "Put `module.` or another prefix before keys.",
    "rename": "Rename keys by regular expressions.",
    "to-cpu": "Tag every storage `cpu`, so that it loads without a GPU.",
    "convert": "Write a checkpoint in another container.",
    "diff": "Compare two checkpoints: keys, shapes, dtypes, values.",
}


def _no_command(name: str, context: click.Context) -> Misuse:
    """There is no such command; the hint has what may be meant."""
    import difflib

    near = [verb for verb in COMMANDS if verb.startswith(name)]
    near = near or difflib.get_close_matches(name, COMMANDS, 1)
    hint = Hint("did you mean", command(near[0])) if near else None
    if os.path.exists(name):
        hint = Hint("see what is in it", command("inspect", name))
    return Misuse(f"there is no command {name!r}", hint, context)


class _Verbs(click.Group):
    """A group that knows its commands by name, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ckptfix.cli.{cmd_name.replace('-', '_')}")
        verb: click.Command = module.command
        verb.help = _as_written(verb.help)
        return verb

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.ensure_object(output.Form).is_json = "--json" in args
            raise _no_command(args[0], ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ckptfix", message="%(prog)s %(version)s")
def group() -> None:
    r"""Convert and repair PyTorch checkpoints, without running or loading them.

    \b
    Examples:
      ckptfix inspect model.pt
      ckptfix strip-prefix model.pt fixed.pt
      ckptfix to-cpu model.pt fixed.pt

    \b
    Exit codes:
      0  done, or the answer is yes
      1  the answer is no, or there was nothing to do
      2  it could not be done, and nothing was written

    Each COMMAND --help says what they mean there; --json answers in JSON.
    """


def _as_written(help: str | None) -> str | None:  # noqa: A002 - click's name for it
    r"""Help in which `\b` is the character by which click knows lines to leave as they are.

    The docstrings that it comes from are raw, since their examples hold backslashes.
    """
    return help and help.replace("\\b\n", "\b\n")


group.help = _as_written(group.help)


def main() -> NoReturn:
    """Run the command line and exit. Bad input ends in `error:` and `hint:`, not in a traceback."""
    output.start()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start some, for nothing here
    code = _run(output.Form())
    gc.freeze()  # what is left ends with the process: not searched for garbage first
    sys.exit(code)


def _run(form: output.Form) -> int:
    """The exit code of the command that the arguments of the program name."""
    try:
        return group.main(prog_name="ckptfix", standalone_mode=False, obj=form) or 0
    except CkptfixError as error:
        return output.refuse(form, error)
    except click.exceptions.NoArgsIsHelpError as error:
        return output.usage(error.format_message())
    except click.UsageError as error:
        form.note_given(error.ctx)
        return output.error(form, error.format_message().rstrip("."), hint_for(error), "usage")
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        return output.error(form, "interrupted", None, "interrupted", exit_code=130)
    except MemoryError:
        hint = Hint("see what is free", shell("free", "-h"))
        return output.error(form, "there is not enough memory", hint, "memory")
    except Exception as error:  # noqa: BLE001 - the last net under everything
        return output.bug(form, error)
