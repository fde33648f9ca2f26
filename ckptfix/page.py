"""A report to look at: one page that needs nothing else, no network and no build.

The page is `page.html`; what it shows is JSON inside it. Keys and messages are a stranger's text,
so they only ever become text nodes there, and `<` never appears in the JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.place import Place
from ckptfix.contents.state_dicts import choose, find, of_models
from ckptfix.diagnose.document import diagnose
from ckptfix.report import shape

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from ckptfix.diffs.documents import Diff, StateDiff
    from ckptfix.tree.document import Document, Tensor

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
    facts = (document.container, f"{document.nbytes:,} bytes", f"{len(tensors):,} tensors")
    return page(document.name, facts, tensors, findings, COLUMNS)


def _row(key: str, tensor: Tensor) -> dict[str, Any]:
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
    counts = Counter(row["change"] for row in rows)
    facts = [f"{count:,} {what}" for what, count in counts.items()]
    return page(f"{diff.a} → {diff.b}", facts, rows, [], (*COLUMNS[:4], "change", "by"))


def _changes(state: StateDiff, a: Document, b: Document) -> Iterator[dict[str, Any]]:
    """One row for each tensor of either side, named as the first has it."""
    ours, theirs = choose(a, state.a).tensors, choose(b, state.b).tensors
    added = {key: tensor for key, tensor in theirs.items() if key in state.added}
    changes = _what_changed(state)
    for key, tensor in (*ours.items(), *added.items()):
        change, by = changes.get(key, ("same", ""))
        yield {**_row(key, tensor), "change": change, "by": by, "changed": change != "same"}


def _what_changed(state: StateDiff) -> dict[str, tuple[str, str]]:
    """What became of each key that is not the same on both sides, and by how much."""
    return {
        **{key: ("renamed", other) for key, other in state.renamed.items()},
        **{row.key: ("values", _by(row.distance.max_abs)) for row in state.values},
        **{row.key: ("dtype", f"to {row.wanted.dtype}") for row in state.dtypes},
        **{row.key: ("shape", f"to {shape(row.wanted)}") for row in state.shapes},
        **dict.fromkeys(state.removed, ("removed", "")),
        **dict.fromkeys(state.added, ("added", "")),
    }


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
