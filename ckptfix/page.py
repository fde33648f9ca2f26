"""A report to look at: one page that needs nothing else, no network and no build.

The page is `page.html`; what it shows is JSON inside it. Keys and messages are a stranger's text,
so they only ever become text nodes there, and `<` never appears in the JSON.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.place import Place
from ckptfix.contents.state_dicts import choose_all, find, of_models
from ckptfix.contents.tensors import as_tensor
from ckptfix.diagnose.document import diagnose
from ckptfix.edit.counting import held
from ckptfix.report import shape
from ckptfix.tree.document import kind

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from ckptfix.diffs.documents import Diff, StateDiff
    from ckptfix.tree.document import Document, Node

COLUMNS = ("key", "shape", "dtype", "bytes", "device")


def of_document(document: Document) -> str:
    """The page of one checkpoint: treemap of bytes by module, tensors, findings."""
    states = of_models(find(document.root))
    several = len(states) > 1
    tensors = [
        _row(f"{state.path}.{key}" if several else key, tensor)
        for state in states
        for key, tensor in state.tensors.items()
    ]
    findings = [found.as_dict() for found in diagnose(document)]
    facts = (document.container, f"{document.nbytes:,} bytes", str(held(document)))
    return page(document.name, facts, tensors, findings, COLUMNS)


def _row(key: str, node: Node) -> dict[str, Any]:
    tensor = as_tensor(node)
    if tensor is None:
        return {"key": key, "shape": "", "dtype": kind(node), "bytes": 0, "device": ""}
    return {
        "key": key,
        "shape": str(list(tensor.shape)),
        "dtype": tensor.dtype.name,
        "bytes": tensor.nbytes,
        "device": tensor.storage.device,
    }


def of_diff(diff: Diff, a: Document, b: Document) -> str:
    """The page of two checkpoints: what changed, how much, tensor by tensor."""
    rows = [row for state in diff.state_dicts for row in _changes(state, a, b)]
    return page(f"{diff.a} → {diff.b}", diff.summary, rows, [], (*COLUMNS[:4], "change", "by"))


def _changes(state: StateDiff, a: Document, b: Document) -> Iterator[dict[str, Any]]:
    """One row for each key of either side, named as the first has it."""
    ours, theirs = choose_all(a, [state.a])[0].mapping, choose_all(b, [state.b])[0].mapping
    changes = _what_changed(state)
    for key, node in ours.items():
        found = changes.get(key, [("same", "")])
        change, by = (", ".join(filter(None, parts)) for parts in zip(*found, strict=True))
        yield {**_row(key, node), "change": change, "by": by, "changed": key in changes}
    for key in state.added:
        yield {**_row(key, theirs[key]), "change": "added", "by": "", "changed": True}


def _what_changed(state: StateDiff) -> dict[str, list[tuple[str, str]]]:
    """What became of each key of the first that is not the same in the second, and by how much."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key, change, by in (
        *((key, "removed", "") for key in state.removed),
        *((key, "renamed", other) for key, other in state.renamed.items()),
        *((row.key, "shape", f"to {shape(row.wanted)}") for row in state.shapes),
        *((row.key, "dtype", f"to {row.wanted.dtype}") for row in state.dtypes),
        *((row.key, "values", _by(row.distance.max_abs)) for row in state.values),
    ):
        found.setdefault(key, []).append((change, by))
    return found


def _by(distance: float | None) -> str:
    return "" if distance is None else f"at most {distance:.3g}"


def write(text: str, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a page to a file, whole or not at all. Raises `WriteError`."""
    with Place(path).publish(force=force) as sink:
        sink.write(text.encode())


def page(
    title: str,
    facts: Sequence[str],
    tensors: Sequence[dict[str, Any]],
    findings: Sequence[dict[str, Any]],
    columns: Sequence[str],
) -> str:
    """A page with a treemap by `bytes` and a table of `columns` of the `tensors`."""
    data = {
        "title": title,
        "facts": list(facts),
        "tensors": list(tensors),
        "findings": list(findings),
        "columns": list(columns),
    }
    template = resources.files("ckptfix").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", json.dumps(data).replace("<", "\\u003c"))
