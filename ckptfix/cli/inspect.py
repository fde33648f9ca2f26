"""`ckptfix inspect`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from ckptfix import formats, wrappers
from ckptfix.cli import options, output
from ckptfix.diagnose import diagnose, globals_of, ties, wasted
from ckptfix.document import Inert, Node, Storage, Tensor, as_tensor
from ckptfix.edits import kind
from ckptfix.findings import Severity
from ckptfix.state_dicts import StateDict, find
from ckptfix.trees import children, storages

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

    from ckptfix.document import Document
    from ckptfix.findings import Finding

_TENSORS, _VALUES, _DEPTH = 24, 12, 4
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


@click.command("inspect")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@click.option("--all", "everything", is_flag=True, help="Show every tensor and value.")
@options.as_json
def command(files: tuple[str, ...], everything: bool) -> int:
    r"""Show what is in a checkpoint, and what is wrong with it.

    The tree, with each tensor's shape, dtype, bytes and saved device; then what was noticed, each
    with the command that mends it. Only the structure is read, never the weights, and nothing in
    the file is run.

    \b
    Examples:
      ckptfix inspect model.pt
      ckptfix inspect --json model.pt

    \b
    Exit codes:
      0  every file was read
      2  a file cannot be read
    """
    documents = [formats.read(file) for file in files]
    found = [diagnose(document) for document in documents]
    reports = [_data(*pair) for pair in zip(documents, found, strict=True)]
    data = reports[0] if len(reports) == 1 else {"files": reports}

    def draw(console: Console) -> None:
        for document, findings in zip(documents, found, strict=True):
            _draw(console, document, findings, everything)

    output.answer({"command": "inspect", **data}, draw)
    return 0


# --- as JSON


def _data(document: Document, findings: list[Finding]) -> dict[str, Any]:
    return {
        "file": document.name,
        "container": document.container,
        "bytes": document.nbytes,
        "byteorder": document.byteorder,
        "metadata": dict(document.metadata),
        "devices": Counter(storage.device for storage in storages(document.root)),
        "wasted_bytes": wasted(document),
        "globals": [str(name) for name in globals_of(document)],
        "state_dicts": [_state_data(state) for state in find(document.root)],
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "where": finding.where,
                "message": finding.message,
                "command": finding.command,
            }
            for finding in findings
        ],
    }


def _state_data(state: StateDict) -> dict[str, Any]:
    return {
        "path": state.path,
        "role": state.role,
        "prefix": _prefix(state),
        "ties": ties(state),
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


def _prefix(state: StateDict) -> str:
    if state.role == "optimizer":
        return ""
    return "".join(f"{part}." for part in wrappers.detect(state.mapping).leading)


# --- as a tree


def _draw(console: Console, document: Document, findings: list[Finding], everything: bool) -> None:
    from rich.text import Text
    from rich.tree import Tree

    title = Text.assemble(
        (output.printable(document.name), "bold"),
        f"  {document.container}, {output.size(document.nbytes)}",
    )
    drawing = _Drawing(find(document.root), everything)
    tree = Tree(title, guide_style="dim")
    root = document.root
    label = drawing.label("", root)
    if label.plain.strip():
        title.append(f", {label.plain.strip()}")
    drawing.add(tree, root, 0)
    console.print(tree)
    _draw_findings(console, findings)


class _Drawing:
    """Turns nodes into branches; a node that was drawn before is only named again."""

    def __init__(self, states: list[StateDict], everything: bool) -> None:
        self._states = {id(state.mapping): state for state in states}
        self._everything = everything
        self._drawn: set[int] = set()

    def add(self, branch: Tree, node: Node, depth: int) -> None:
        """Draw what a node holds under its branch."""
        if id(node) in self._drawn or not _holds(node):
            return
        self._drawn.add(id(node))
        state = self._states.get(id(node))
        if state is not None and state.role != "optimizer":
            self._add_state(branch, state, depth)
        elif depth < _DEPTH or self._everything:
            self._add_values(branch, list(_values(node)), depth)

    def _add_state(self, branch: Tree, state: StateDict, depth: int) -> None:
        shown = list(state.tensors.items())
        hidden = 0 if self._everything else max(len(shown) - _TENSORS, 0)
        branch.add(_tensor_table(shown[: len(shown) - hidden]))
        if hidden:
            branch.add(_dim(f"… and {output.plural(hidden, 'tensor')} more (--all shows them)"))
        self._add_values(branch, list(state.others.items()), depth)

    def _add_values(self, branch: Tree, values: list[tuple[str, Node]], depth: int) -> None:
        hidden = 0 if self._everything else max(len(values) - _VALUES, 0)
        for name, node in values[: len(values) - hidden]:
            self.add(branch.add(self.label(name, node)), node, depth + 1)
        if hidden:
            branch.add(_dim(f"… and {hidden:,} more (--all shows them)"))

    def label(self, name: str, node: Node) -> Text:
        """One line that says what a node is."""
        from rich.text import Text

        state = self._states.get(id(node))
        if state is not None:
            told, style = _describe_state(state), "green"
        else:
            told, style = _describe(node), "dim" if _holds(node) else ""
        return Text.assemble((output.printable(name), "bold"), "  ", (told, style))


def _values(node: Node) -> list[tuple[str, Node]]:
    """What a person wants to see inside a node; how it would be built only where that tells."""
    if not isinstance(node, Inert):
        return [(name, child) for name, child in children(node) if name != "<attributes>"]
    hidden = ("<function>", "<state>", "<key>") if not node.state else ("<function>", "<key>")
    bare = not node.args or node.has_state or node.pairs or node.items
    return [
        (name, child)
        for name, child in children(node)
        if name not in hidden and not (name == "<args>" and bare)
    ]


def _holds(node: Node) -> bool:
    return isinstance(node, (dict, list, Inert)) or type(node) is tuple


def _describe_state(state: StateDict) -> str:
    if state.role == "optimizer":
        held, groups = len(state.mapping["state"]), len(state.mapping["param_groups"])
        counted = f"{output.plural(held, 'parameter')}, {output.plural(groups, 'group')}"
        return f"optimizer state of {counted}"
    tensors = state.tensors.values()
    buffers = {id(tensor.storage): tensor.storage for tensor in tensors}
    role = {"ema": "state dict (EMA)", "swa": "state dict (SWA)"}.get(state.role, "state dict")
    parts = [role, output.plural(len(state.tensors), "tensor")]
    parts.append(output.size(sum(storage.nbytes for storage in buffers.values())))
    parts.append("/".join(dict.fromkeys(storage.device for storage in buffers.values())))
    prefix = _prefix(state)
    if prefix:
        parts.append(f"prefix {prefix}")
    return ", ".join(part for part in parts if part)


def _describe(node: Node) -> str:
    tensor = as_tensor(node)
    if tensor is not None:
        return _describe_tensor(tensor)
    if isinstance(node, Storage):
        return f"storage of {node.numel} {node.dtype}, {node.device}"
    if isinstance(node, Inert):
        plain = node.args and not node.has_state and all(not _holds(arg) for arg in node.args)
        return f"{node.cls}({', '.join(map(_short, node.args))})" if plain else node.cls
    if isinstance(node, (dict, list)) or type(node) is tuple:
        return kind(node)
    return _short(node)


def _short(value: Node) -> str:
    text = str(value) if isinstance(value, tuple) else repr(value)
    return output.printable(text if len(text) <= 60 else f"{text[:57]}…")


def _describe_tensor(tensor: Tensor) -> str:
    shape = list(tensor.shape)
    return f"{shape} {tensor.dtype} {output.size(tensor.nbytes)} {tensor.storage.device}"


def _tensor_table(tensors: list[tuple[str, Tensor]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, style="dim")
    for key, tensor in tensors:
        table.add_row(
            Text(output.printable(key)),
            str(list(tensor.shape)),
            tensor.dtype.name,
            output.size(tensor.nbytes),
            output.printable(tensor.storage.device),
        )
    return table


def _dim(text: str) -> Text:
    from rich.text import Text

    return Text(text, "dim")


def _draw_findings(console: Console, findings: list[Finding]) -> None:
    from rich.text import Text

    for finding in findings:
        where = "" if finding.where == "/" else f" ({output.printable(finding.where)})"
        line = Text.assemble(
            (f"{finding.severity:7}", _STYLES[finding.severity]),
            f" {finding.code}{where}: {output.printable(finding.message)}",
        )
        console.print(line)
        if finding.command is not None:
            console.print(
                Text(f"        {output.printable(finding.command)}", "cyan"), soft_wrap=True
            )
