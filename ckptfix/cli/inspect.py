"""`ckptfix inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix.cli import findings, options, output, paths, reading, tree
from ckptfix.cli.usage import Misuse
from ckptfix.contents.state_dicts import StateDict, find
from ckptfix.contents.tensors import device_tags
from ckptfix.diagnose.document import diagnose, globals_of, wasted
from ckptfix.errors import CkptfixError
from ckptfix.tree.document import kind

if TYPE_CHECKING:
    from rich.console import Console

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

    \b
    Exit codes:
      0  every file was read
      2  a file cannot be read
    """
    if html is not None:
        return _write_page(files, html, force=force)
    if len(files) == 1:
        document = reading.read(files[0])
        found = diagnose(document)
        output.answer(
            lambda: {"command": "inspect", **_data(document, found)},
            lambda console: _draw(console, document, found, everything),
        )
        return 0
    return _inspect_all(files, everything=everything)


def _write_page(files: tuple[str, ...], html: str, *, force: bool) -> int:
    from ckptfix import page

    if len(files) > 1:
        raise Misuse("--html: draws one FILE")
    text = page.of_document(reading.read(files[0]))
    if html == paths.STDOUT:
        output.page(text)
        return 0
    page.write(text, html, force=force)
    output.answer({"command": "inspect", "file": files[0], "page": html}, f"wrote {html}")
    return 0


def _inspect_all(files: tuple[str, ...], *, everything: bool) -> int:
    """Inspect several files; one that cannot be read does not hide the others."""
    read: list[tuple[Document, list[Finding]]] = []
    unread: list[tuple[str, CkptfixError]] = []
    for file in files:
        try:
            document = reading.read(file)
            read.append((document, diagnose(document)))
        except CkptfixError as error:
            unread.append((file, error))

    def draw(console: Console) -> None:
        for index, (document, found) in enumerate(read):
            if index:
                console.print()
            _draw(console, document, found, everything)

    errors = [
        {
            "file": file,
            "error": {
                "code": error.code,
                "message": error.message,
                "hint": output.said(error.hint),
            },
        }
        for file, error in unread
    ]

    def data() -> dict[str, Any]:
        rows = [_data(*pair) for pair in read]
        return {"command": "inspect", "files": rows, "unread": errors}

    output.answer(data, draw)
    for _, problem in unread:
        output.complain(problem.message, problem.hint)
    return 2 if unread else 0


def _draw(console: Console, document: Document, found: list[Finding], everything: bool) -> None:
    console.print(tree.draw(document, console.width, everything=everything))
    findings.draw(console, document, found)


def _data(document: Document, found: list[Finding]) -> dict[str, Any]:
    return {
        "file": document.name,
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


def _state_data(state: StateDict) -> dict[str, Any]:
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
