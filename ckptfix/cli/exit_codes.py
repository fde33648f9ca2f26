"""What the exit code of each verb means: the one table that `--help` and the documentation show.

0: done, or the answer is yes. 1: the answer is no, or there was nothing to do. 2: it could not be
done, and nothing was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_WRITTEN = "OUT was written, or IN was changed in place"

EXIT_CODES: Mapping[str, Mapping[int, str]] = {
    "inspect": {
        0: "every FILE was read, whatever is wrong with it",
        2: "a FILE cannot be read",
    },
    "check": {
        0: "every FILE is sound, and fits",
        1: "a FILE is damaged, or has an error, or does not fit",
        2: "a FILE is not a checkpoint, or the model cannot be built",
    },
    "fix": {
        0: "OUT was written: repaired, or a copy of what was sound",
        1: "OUT was written, and has an error that nothing repairs",
        2: "IN cannot be read, or cannot be made to fit (a key is missing, a shape differs, two "
        "ways fit, or two keys would become one), or OUT cannot be written; nothing was written",
    },
    "recover": {
        0: "OUT was written, with every tensor",
        1: "OUT was written, and some tensors are lost",
        2: "nothing could be saved, IN holds several saves, or OUT cannot be written; nothing was "
        "written",
    },
    "explain": {
        0: "the error is known",
        1: "no known error is in the text",
        2: "the text cannot be read",
    },
    "strip-prefix": {
        0: _WRITTEN,
        1: "there is nothing to strip; nothing was written",
        2: "IN cannot be read, or only some keys carry the prefix, or two keys would become one, "
        "or OUT cannot be written; nothing was written",
    },
    "add-prefix": {
        0: _WRITTEN,
        1: "there is nothing to add; nothing was written",
        2: "IN cannot be read, or holds several state dicts (name one with --select), or OUT "
        "cannot be written; nothing was written",
    },
    "rename": {
        0: _WRITTEN,
        1: "no key matches; nothing was written",
        2: "RE is not valid, or IN cannot be read, or two keys would become one, or OUT cannot be "
        "written; nothing was written",
    },
    "to-cpu": {
        0: _WRITTEN,
        1: "every storage is on the CPU already; nothing was written",
        2: "IN cannot be read, or OUT cannot be written; nothing was written",
    },
    "convert": {
        0: "OUT was written",
        2: "IN cannot be read, or holds several state dicts (name one with --select), or OUT "
        "cannot hold it, or cannot be written; nothing was written",
    },
    "diff": {
        0: "they are the same",
        1: "they differ",
        2: "one cannot be read, or there is no such state dict",
    },
}
"""By verb. Of several files, the worst of their codes is that of the command."""


def as_markdown() -> str:
    """The table, as `docs/exit-codes.md` has it."""
    rows = ["| verb | 0 | 1 | 2 |", "|---|---|---|---|"]
    for verb, codes in EXIT_CODES.items():
        cells = (codes.get(code, "never") for code in (0, 1, 2))
        rows.append(f"| `{verb}` | {' | '.join(cells)} |")
    return "\n".join(rows)
