"""State dicts of other frameworks, whose values lie in another layout under the same names.

PaddlePaddle keeps the weight of a Linear as `[in, out]`, torch as `[out, in]`; a square one loads
without a word, transposed. `paddle.save` tells itself by a key that no torch module can have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.errors import UnsupportedError
from ckptfix.hints import Hint, command

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.tree.document import Document

_PADDLE = "StructuredToParameterName@@"


def framework_of(keys: Iterable[str]) -> str | None:
    """The framework whose state dict it is, where that is another one than torch."""
    return "PaddlePaddle" if _PADDLE in keys else None


def check(document: Document, path: str, keys: Iterable[str]) -> None:
    """Refuse the keys of a state dict whose values do not lie as torch has them.

    Raises `UnsupportedError`.
    """
    framework = framework_of(keys)
    if framework is None:
        return
    raise UnsupportedError(
        f"is a state dict of {framework}, which keeps the weight of each Linear transposed "
        "and calls parts of a BatchNorm by other names",
        where=document.name if path == "/" else f"{document.name} ({path})",
        hint=Hint(
            f"look for a file for torch, or transpose those weights in {framework}; see which",
            command("inspect", document.name, all=True),
        ),
        code="other-framework",
    )
