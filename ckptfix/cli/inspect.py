"""`ckptfix inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptfix.cli import findings, options, output, paths, reading, tree
from ckptfix.cli.usage import Misuse
from ckptfix.contents.state_dicts import StateDict, find
from ckptfix.contents.tensors import device_tags
from ckptfix.diagnose.document import diagnose, globals_of, wasted
from ckptfix.tree.document import kind

if TYPE_CHECKING:
    from rich.console import Console

    from ckptfix.cli import answers
    from ckptfix.findings import Finding
    from ckptfix.tree.document import Document


@click.command("inspect", cls=paths.Verb)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=paths.Read())
@click.option("--all", "everything", is_flag=True, help="Show every tensor and value.")
@click.option(
    "--html",
    metavar="PAGE",
    type=paths.Written(),
    help="Draw it as a web page instead (-: print that).",
)
@click.option("--force", "-f", is_flag=True, help="Replace PAGE if it is there.")
@options.as_json
def command(files: tuple[str, ...], everything: bool, html: str | None, force: bool) -> int:
    r"""Show what is in a checkpoint, and what is wrong with it.

    The tree, with each tensor's shape, dtype, bytes and saved device; then what was noticed, each
    with the command that repairs it. Only the structure is read, never the weights, and nothing in
    the file is run.

    \b
    Examples:
      ckptfix inspect model.pt
      ckptfix inspect --json model.pt
      ckptfix inspect model.pt --html report.html
    """
    if html is not None:
        return _write_page(files, html, force=force)
    return output.each(files, lambda file: _inspect(file, everything=everything))


def _write_page(files: tuple[str, ...], html: str, *, force: bool) -> int:
    from ckptfix import page

    if len(files) > 1:
        raise Misuse("--html: draws one FILE")
    text = page.of_document(reading.read(files[0]))
    if html == paths.STDOUT:
        return output.page(text)
    page.write(text, html, force=force)
    return output.answer({}, f"wrote {html}", input=files[0], output=html)


def _inspect(file: str, *, everything: bool) -> int:
    document = reading.read(file)
    found = diagnose(document)
    return output.answer(
        lambda: _data(document, found),
        lambda console: _draw(console, document, found, everything),
        input=file,
    )


def _draw(console: Console, document: Document, found: list[Finding], everything: bool) -> None:
    console.print(tree.draw(document, console.width, everything=everything))
    findings.draw(console, document, found)


def _data(document: Document, found: list[Finding]) -> answers.Inspect:
    return {
        "container": document.container,
        "bytes": document.nbytes,
        "byteorder": document.byteorder,
        "metadata": dict(document.metadata),
        "devices": device_tags(document.root),
        "wasted_bytes": wasted(document),
        "globals": [str(name) for name in globals_of(document)],
        "state_dicts": [_state_data(state) for state in find(document.root)],
        "findings": findings.rows(found),
    }


def _state_data(state: StateDict) -> answers.StateDict:
    return {
        "path": state.path,
        "role": state.role,
        "prefix": tree.prefix_of(state),
        "ties": state.ties,
        "tensors": [
            {
                "key": key,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype.name,
                "bytes": tensor.nbytes,
                "device": tensor.storage.device,
            }
            for key, tensor in state.tensors.items()
        ],
        "others": {str(key): kind(node) for key, node in state.others.items()},
    }
