"""A document reduced to what a container can hold: one state dict, or tensors and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import door
from ckptfix.contents.state_dicts import StateDict, beside_loose, choose, find, known
from ckptfix.contents.tensors import as_tensor, is_packed, is_special_tensor, special_class
from ckptfix.edit import flat
from ckptfix.edit.compacting import gathered
from ckptfix.errors import UnsafeError, UnsupportedError
from ckptfix.hints import Hint
from ckptfix.layouts import in_pieces, tensor_parallel
from ckptfix.tree.document import (
    Document,
    Inert,
    Node,
    OrderedMap,
    Storage,
    Tensor,
    contiguous_stride,
    kind,
)
from ckptfix.tree.walk import children, script_constants, walk

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ckptfix.formats.table import Writable


# --- fitting a container


class Fitted(NamedTuple):
    """A document that a container can hold, and what of the original it leaves out."""

    document: Document
    left_out: list[tuple[str, str]]
    """Path and kind of each thing that is not in it, such as `("epoch", "int")`."""


def only(document: Document, state: StateDict) -> Fitted:
    """The document reduced to one state dict."""
    known(document, state)
    if state.mapping is document.root:
        return Fitted(document, [])
    if state.role == "loose":
        left_out = beside_loose(document.root)
    else:
        left_out = _beside(document.root, state.node)
    constants = len(script_constants(document))
    if constants:
        left_out.append(("constants.pkl", f"{constants} tensors without names"))
    if isinstance(state.origin, Inert):
        left_out.append((state.path, f"{state.origin.cls}, apart from its weights"))
    return Fitted(replace(document, root=state.mapping, extras={}), left_out)


def flatten(document: Document, state: StateDict) -> Fitted:
    """The document as safetensors holds it: one state dict, every value a dense row-major tensor.

    What is not a tensor is left out. Tensors of another layout are made row-major when they are
    written, one at a time. Raises `UnsupportedError` for tensors that safetensors cannot hold: to
    leave one of those out would be to lose weights.
    """
    fitted = only(document, state)
    left_out = fitted.left_out
    flat = OrderedMap(attributes=state.metadata and {"_metadata": state.metadata})
    dense: dict[Hashable, Tensor] = {}  # tied tensors stay one
    repeated = 0
    for key, node in state.mapping.items():
        tensor = as_tensor(node)
        if tensor is not None:
            if tensor.view not in dense:
                dense[tensor.view] = _dense(tensor, key, document)
                repeated += max(tensor.nbytes - tensor.storage.nbytes, 0)
                _check_repeated(repeated, key, document)
            flat[key] = dense[tensor.view]
        elif is_special_tensor(node):
            raise cannot_hold(document, key, *_special(special_class(node)))
        elif is_packed(node):
            raise cannot_hold(document, key, "packed quantized weight")
        else:
            left_out.append((_below(state.path, key), kind(node)))
    return Fitted(replace(fitted.document, root=flat, extras={}), left_out)


def _check_repeated(nbytes: int, key: str, document: Document) -> None:
    """Refuse a few bytes that would fill a disk."""
    if nbytes > document.limits.repeated_bytes:
        raise UnsafeError(
            f"{key!r} repeats its elements: without strides it would take {nbytes} bytes more",
            where=document.name,
            hint=Hint(
                "write a .pt file instead, which keeps strides: give OUT the extension .pt",
                python="save it to a .pt file instead, which keeps strides",
            ),
        )


def _dense(tensor: Tensor, key: str, document: Document) -> Tensor:
    if tensor.dtype.safetensors is None:
        raise cannot_hold(document, key, f"{tensor.dtype} tensor")
    swapped = document.byteorder != "little" and tensor.dtype.itemsize > 1
    plain = replace(tensor, requires_grad=False, hooks=None, metadata=None)
    if tensor.is_contiguous and not swapped and not tensor.metadata:
        return plain
    return _gathered(tensor, document.byteorder, repr(key))


def _gathered(tensor: Tensor, byteorder: str, label: str) -> Tensor:
    """The same tensor over a storage of its own, whose bytes are gathered when they are written."""
    span = gathered(tensor, byteorder, label)
    storage = Storage(tensor.dtype, tensor.numel, "cpu", (span,), tensor.storage.key)
    return Tensor(storage, tensor.dtype, tensor.shape, contiguous_stride(tensor.shape))


_SPECIAL = (
    ("sparse", "sparse tensor", "x.to_dense()"),
    ("qtensor", "quantized tensor", "x.dequantize()"),
    ("nested", "nested tensor", "x.to_padded_tensor(0.0)"),
    ("meta", "meta tensor, without data", ""),
    ("Uninitialized", "parameter without a shape, of a lazy module", ""),
)


def _special(cls: str) -> tuple[str, str]:
    """What a person would call a tensor that is not dense, and what makes it dense in torch."""
    found = ((what, dense) for part, what, dense in _SPECIAL if part in cls)
    return next(found, ("tensor subclass", ""))


def cannot_hold(document: Document, key: str, what: str, dense: str = "") -> UnsupportedError:
    """The refusal of a value that safetensors has no form for; `dense` is code that makes one."""
    instead = f", or save {dense} of it in torch first" if dense else ""
    return UnsupportedError(
        f"{key!r} is a {what}, which safetensors cannot hold",
        where=document.name,
        hint=Hint(
            f"write a .pt file instead: give OUT the extension .pt{instead}",
            python=f"save it to a .pt file instead{instead}",
        ),
    )


def _below(path: str, key: str) -> str:
    return key if path == "/" else f"{path}/{key}"


def _beside(root: Node, kept: Node) -> list[tuple[str, str]]:
    """What lies beside the way from the root to `kept`, each whole."""
    way = next(path for path, node in walk(root) if node is kept)
    left: list[tuple[str, str]] = []
    above = "/"
    for step in way:
        left += [
            (_below(above, name), kind(child)) for name, child in children(root) if name != step
        ]
        root = dict(children(root)).get(step)
        above = _below(above, step)
    return left


def fit(document: Document, container: Writable, select: str | None = None) -> Fitted:
    """The document as a container holds it, reduced to the state dict at `select` if given."""
    if container.tensors_only:
        return flatten(document, choose(document, select))
    fitted = Fitted(document, []) if select is None else only(document, choose(document, select))
    if container is door.DCP:
        from ckptfix.layouts import dcp_writer

        lost = dcp_writer.take_apart(fitted.document).lost
        fitted = fitted._replace(left_out=[*fitted.left_out, *lost])
    texts = [(f"__metadata__/{key}", "str") for key in document.metadata if key != "format"]
    return fitted._replace(left_out=[*fitted.left_out, *texts])


def check_joined(document: Document) -> None:
    """Refuse to write what was in pieces and is not put together. Raises `UnsupportedError`."""
    check_one(document)
    if document.container in (in_pieces.DCP, in_pieces.RANKS):
        for state in find(document.root):
            keys = flat.flat_in(state.mapping)
            if keys:
                raise flat.refuse(document, keys)


def check_one(document: Document) -> None:
    """Refuse a folder of slices, of which the document is the first. Raises `UnsupportedError`."""
    if document.container == tensor_parallel.NAME and document.slices:
        raise UnsupportedError(
            f"holds the slices of {len(document.slices)} ranks of tensor parallelism, and nothing "
            "that says how they are joined",
            where=document.name,
            hint=flat.which_model(document),
            code="tensor-parallel",
        )
