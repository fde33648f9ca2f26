"""A report to look at: one page that needs nothing else, no network and no build.

The page is `report.html`; what it shows is JSON inside it. Keys and messages are a stranger's text,
so they only ever become text nodes there, and `<` never appears in the JSON.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from ckptfix.diagnose import diagnose
from ckptfix.state_dicts import find, of_models

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.document import Document

COLUMNS = ("key", "shape", "dtype", "bytes", "device")


def of_document(document: Document) -> str:
    """The page of one checkpoint: treemap of bytes by module, tensors, findings."""
    states = of_models(find(document.root))
    several = len(states) > 1
    tensors = [
        {
            "key": f"{state.path}.{key}" if several else key,
            "shape": str(list(tensor.shape)),
            "dtype": tensor.dtype.name,
            "bytes": tensor.nbytes,
            "device": tensor.storage.device,
        }
        for state in states
        for key, tensor in state.tensors.items()
    ]
    findings = [
        {
            "code": found.code,
            "severity": found.severity,
            "where": found.where,
            "message": found.message,
            "command": found.command,
        }
        for found in diagnose(document)
    ]
    facts = (document.container, f"{document.nbytes:,} bytes", f"{len(tensors):,} tensors")
    return page(document.name, facts, tensors, findings, COLUMNS)


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
    template = resources.files("ckptfix").joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", json.dumps(data).replace("<", "\\u003c"))
