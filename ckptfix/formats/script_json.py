"""TorchScript of PyTorch 1.0 and 1.1: a zip that describes its model in JSON.

    model.json    {"mainModule": MODULE, "tensors": [TENSOR, …], …}
                  MODULE  {"name": …, "parameters": [{"name": …, "tensorId": "0"}, …],
                           "submodules": [MODULE, …]}
                  TENSOR  {"dims": ["2", "3"], "strides": ["3", "1"], "offset": "0",
                           "dataType": "FLOAT", "data": {"key": "tensors/0"}, "device": "cpu"}
    tensors/N     the bytes of a storage, which several tensors may view
    code/…        the program, carried nowhere

Numbers are text where they have 64 bits; what is 0, false or empty is left out, as protobuf does in
JSON. Constants of the program are tensors without a name; they are called `tensors.N` here. Source:
caffe2/proto/torch.proto and torch/csrc/jit/export.cpp of PyTorch 1.1.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ckptfix.errors import DamagedError, UnsupportedError
from ckptfix.pickles import torch_objects
from ckptfix.tree.document import Document, OrderedMap, Storage, Tensor, reach
from ckptfix.tree.dtypes import BY_NAME, DType

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ckptfix.bytes.span import Span
    from ckptfix.formats.reading import Reading

NAME = "TorchScript zip of 1.0"
_MODEL = "model.json"
_DTYPES = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "INT64": "int64",
    "INT32": "int32", "INT16": "int16", "INT8": "int8", "UINT8": "uint8", "BYTE": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def model_in(records: Mapping[str, Span]) -> str | None:
    """The record that describes the model, where these are the records of such an archive."""
    found = [name for name in records if name.rpartition("/")[2] == _MODEL and name.count("/") < 2]
    return found[0] if len(found) == 1 else None


def read(
    records: Mapping[str, Span], model: str, name: str, size: int, reading: Reading
) -> Document:
    """The tensors of the model by attribute path; one whose record is absent is for `reading`.

    Raises `DamagedError` where they are described wrongly, `UnsupportedError` for unknown dtypes.
    """
    try:
        described = json.loads(records[model].read())
        reader = _Reader(records, model.removesuffix(_MODEL), name, reading)
        tensors = [reader.tensor(entry) for entry in described.get("tensors", ())]
        named = dict(_named(described.get("mainModule", {})))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{model} does not describe a model ({error!r})", where=name) from None
    known = set(named.values())
    for index in range(len(tensors)):
        if index not in known:
            named[f"tensors.{index}"] = index
    if any(index >= len(tensors) for index in named.values()):
        raise DamagedError(f"{model} names a tensor that it does not describe", where=name)
    root = OrderedMap((key, tensors[index]) for key, index in named.items())
    return Document(root, NAME, name, size)


def _named(module: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Names of parameters and buffers by attribute path, and the numbers of their tensors."""
    pending = [("", module)]
    while pending:
        prefix, node = pending.pop()
        for entry in node.get("parameters", ()):
            yield prefix + str(entry["name"]), int(entry.get("tensorId", 0))
        below = [(f"{prefix}{child['name']}.", child) for child in node.get("submodules", ())]
        pending.extend(reversed(below))


class _Reader:
    """Makes tensors of their descriptions; those of one record share a storage."""

    def __init__(
        self, records: Mapping[str, Span], folder: str, name: str, reading: Reading
    ) -> None:
        self._records = records
        self._folder = folder
        self._name = name
        self._reading = reading
        self._storages: dict[str, Storage] = {}

    def tensor(self, entry: dict[str, Any]) -> Tensor:
        shape = tuple(int(size) for size in entry.get("dims", ()))
        stride = tuple(int(step) for step in entry.get("strides", ()))
        dtype = BY_NAME.get(_DTYPES.get(entry["dataType"], ""))
        if dtype is None:
            what = f"a tensor of {entry['dataType']} is not known"
            raise UnsupportedError(what, where=self._name)
        offset, key = int(entry.get("offset", 0)), entry["data"]["key"]
        device, layout = entry.get("device", "cpu"), (offset, shape, stride)
        storage = self._storage(key, dtype, device) or self._lost(key, dtype, device, layout)
        made = torch_objects.tensor(storage, dtype, layout, self._reading.limits)
        if made is None:
            raise ValueError(f"no tensor has shape {shape} and stride {stride}")
        return made

    def _storage(self, key: str, dtype: DType, device: str) -> Storage | None:
        span = self._records.get(self._folder + key)
        if span is None:
            return None
        numel = span.length // dtype.itemsize
        return self._storages.setdefault(key, Storage(dtype, numel, device, (span,), key))

    def _lost(
        self,
        key: str,
        dtype: DType,
        device: str,
        layout: tuple[int, tuple[int, ...], tuple[int, ...]],
    ) -> Storage:
        """What stands for a storage whose record is absent, as large as a tensor needs it."""
        storage = Storage(dtype, reach(*layout), device, (), key)
        self._reading.lose(storage, DamagedError(f"the archive lacks {key!r}", where=self._name))
        return storage
