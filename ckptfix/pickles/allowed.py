"""Which classes and functions `torch.load(weights_only=True)` admits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.tree.dtypes import BY_NAME, BY_STORAGE

if TYPE_CHECKING:
    from ckptfix.tree.document import Global


def is_allowed(name: Global) -> bool:
    """Whether `weights_only=True` admits a class or function (torch 2.13)."""
    module = _PYTHON2.get(name.module, name.module)
    if module in _TENSOR_MODULES and name.name in _TENSORS:
        return name.name != "BoolTensor" or "sparse" not in module
    if module == "torch" and (name.name in BY_NAME or name.name in _TORCH):
        return True
    if module in ("torch", "torch.cuda"):
        return name.name in BY_STORAGE and name.name != "UntypedStorage"
    return f"{module}.{name.name}" in _ALLOWED


_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_TENSOR_MODULES = frozenset({"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"})
_TENSORS = frozenset(
    f"{kind}Tensor"
    for kind in (
        "BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short",
    )
)  # fmt: skip
_TORCH = frozenset(
    {"Size", "Tensor", "device", "per_tensor_affine", "per_channel_affine", "per_tensor_symmetric",
     "per_channel_symmetric", "per_channel_affine_float_qparams"}
)  # fmt: skip
_ALLOWED = frozenset(
    {
        "_codecs.encode",
        *(f"builtins.{name}" for name in ("bytearray", "complex", "set")),
        *(f"collections.{name}" for name in ("Counter", "OrderedDict")),
        "torch._tensor._rebuild_from_type_v2",
        *(
            f"torch._utils._rebuild_{name}"
            for name in (
                "device_tensor_from_cpu_tensor", "device_tensor_from_numpy",
                "meta_tensor_no_storage", "nested_tensor", "parameter", "parameter_with_state",
                "qtensor", "sparse_tensor", "tensor", "tensor_v2", "tensor_v3", "wrapper_subclass",
            )
        ),
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
    }
)  # fmt: skip
"""Source: `torch._weights_only_unpickler._get_allowed_globals`; a test compares the two."""
