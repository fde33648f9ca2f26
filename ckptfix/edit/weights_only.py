"""A state dict reduced to what `torch.load(weights_only=True)` loads: tensors by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptfix.contents.tensors import as_tensor, is_packed, is_special_tensor
from ckptfix.edit.reduce import Fitted, only
from ckptfix.errors import UnsupportedError
from ckptfix.hints import Hint
from ckptfix.pickles.allowed import is_allowed
from ckptfix.tree.document import Document, Global, Node, OrderedMap, Tensor, kind
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from ckptfix.contents.state_dicts import StateDict


def weights_only(document: Document, state: StateDict) -> Fitted:
    """The document reduced to the tensors of one state dict, in an OrderedDict.

    Parameters become the tensors in them. Module versions (`_metadata`) and the packed weights and
    dtypes of quantized modules stay; what else is not a tensor is left out. Raises
    `UnsupportedError` for a tensor of a class that `weights_only=True` refuses: to leave that out
    would be to lose weights.
    """
    fitted = only(document, state)
    left_out = fitted.left_out
    prefix = "" if state.path == "/" else f"{state.path}/"
    kept, plain = OrderedMap(), dict[int, Node]()
    for key, node in state.mapping.items():
        tensor = as_tensor(node)
        if tensor is not None:
            kept[key] = plain.setdefault(id(node), _plain(tensor))
        elif not (is_special_tensor(node) or is_packed(node) or _is_dtype(node)):
            left_out.append((f"{prefix}{key}", kind(node)))
        elif _is_loadable(node):
            kept[key] = node
        else:
            raise _refused(document, key, kind(node))
    kept.attributes, dropped = _attributes(state.mapping)
    left_out += [(f"{prefix}{name}", kind(node)) for name, node in dropped.items()]
    return Fitted(replace(fitted.document, root=kept, extras={}), left_out)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without what else was pickled with it; `conj` and `neg` belong to its values."""
    pickled = tensor.metadata if isinstance(tensor.metadata, dict) else {}
    bits = {name: True for name in ("conj", "neg") if pickled.get(name) is True}
    return replace(tensor, requires_grad=False, hooks=None, metadata=bits or None)


def _is_dtype(node: Node) -> bool:
    return type(node) is Global and node.module == "torch" and is_allowed(node)


def _is_loadable(node: Node) -> bool:
    return all(is_allowed(found) for _, found in walk(node) if type(found) is Global)


def _attributes(mapping: dict[str, Node]) -> tuple[Node, dict[str, Node]]:
    """`_metadata`, if it can be loaded; and the attributes that are left out."""
    attributes = mapping.attributes if isinstance(mapping, OrderedMap) else None
    if attributes is None:
        return None, {}
    if not isinstance(attributes, dict):
        return None, {"<attributes>": attributes}
    versions = {
        name: node
        for name, node in attributes.items()
        if name == "_metadata" and _is_loadable(node)
    }
    dropped = {str(name): node for name, node in attributes.items() if name not in versions}
    return versions or None, dropped


def _refused(document: Document, key: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{key!r} is a {what}, which torch.load(weights_only=True) refuses",
        where=document.name,
        hint=Hint("keep it: leave out --weights-only", python="keep it: leave out .weights_only()"),
    )
