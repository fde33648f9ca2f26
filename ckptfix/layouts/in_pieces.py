"""Which nodes are pieces of a tensor, and not the whole of it. This is asked of every torch zip."""

from __future__ import annotations

from ckptfix.tree.document import Global, Inert, Node
from ckptfix.tree.walk import walk

DCP = "DCP folder"
DCP_SAFETENSORS = "DCP safetensors folder"
RANKS = "files of ranks"
"""The containers in which tensors lie in pieces, as documents call them."""

_REBUILD = Global("torch._tensor", "_rebuild_from_type_v2")


def piece_in(root: Node) -> Inert | None:
    """A piece of a tensor in a tree, if there is one."""
    for _, node in walk(root, tensors=False):
        if type(node) is Inert and kind(node) is not None:
            return node
    return None


def kind(node: Node) -> str | None:
    """The class of a node that is a piece of a tensor; None for any other node."""
    if type(node) is not Inert or node.function != _REBUILD or type(node.args) is not tuple:
        return None
    cls = node.args[1] if len(node.args) == 4 else None
    if type(cls) is not Global or not cls.module.startswith("torch.distributed"):
        return None
    return cls.name if cls.name in ("DTensor", "ShardedTensor") else None
