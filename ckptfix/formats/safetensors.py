"""The safetensors container.

    8 bytes    length N of the header, unsigned, little-endian
    N bytes    JSON object, may be padded with spaces:
               {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …,
                "__metadata__": {"key": "text", …}}
    the rest   tensor bytes, row-major, little-endian; offsets count from here

The tensors cover the rest exactly: no holes, no overlaps, nothing left over. Keys are unique and
the header has at most 100 MB. Source: the safetensors README and `tensor.rs` (0.8).

safetensors knows neither ties nor attributes: of names that share one tensor the first is
written, and `__metadata__` keeps `dropped name: kept name`, as transformers does. The module
versions of a state dict (`_metadata`) are kept there as JSON, so that they come back when the
file is turned into a .pt again.
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

from ckptfix.bytes.span import Span, cut
from ckptfix.contents.tensors import as_tensor
from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError
from ckptfix.findings import Finding
from ckptfix.formats.reading import Reading
from ckptfix.formats.several import after
from ckptfix.formats.table import SAFETENSORS
from ckptfix.limits import DEFAULT, Limits
from ckptfix.tree.document import Document, Node, OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.tree.dtypes import BY_SAFETENSORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ckptfix.bytes.copy import Sink
    from ckptfix.bytes.source import Source
    from ckptfix.formats.reading import Salvage

NAME = SAFETENSORS.name

VERSIONS = "ckptfix.module_versions"
"""The key of `__metadata__` under which `_metadata` is kept."""

_RESERVED = frozenset({"format", VERSIONS})  # keys of `__metadata__` that never name a tie
_ALIGNMENT = 8
_MAX_SIZE = 1 << 63
_MAX_DIMS = 64  # torch's own


def recognises(source: Source) -> bool:
    """Whether a file is meant to be safetensors."""
    head = source.head(9)
    return len(head) >= 9 and head[8:9] == b"{" and head[7] == 0  # a text holds no zero byte


def read(source: Source, limits: Limits = DEFAULT) -> Document:
    """The document in a safetensors file: a mapping of names to tensors. Reads the header only."""
    return _read(source, Reading(limits))


def salvage(source: Source, found: Salvage) -> Document:
    """The same, of a file that may be cut short."""
    return _read(source, found)


def _read(source: Source, reading: Reading) -> Document:
    header, start = _header(source, reading.limits)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null, which the safetensors library reads too
    if not _is_metadata(metadata):
        raise DamagedError("__metadata__ does not map text to text", where=source.name)
    if not _is_unicode((*header, *metadata, *metadata.values())):
        raise DamagedError("the header holds half of a surrogate pair", where=source.name)
    entries = {name: _entry(name, entry, source) for name, entry in header.items()}
    available = source.size - start
    announced = max((end for _, _, _, end in entries.values()), default=0)
    size = max(available, announced) if reading.salvages else available
    _check_layout(entries, size, source.name, reading)
    root = OrderedMap(
        (name, _tensor(name, dtype, shape, Span(source, start + begin, end - begin)))
        for name, (dtype, shape, begin, end) in entries.items()
    )
    for name, (_, _, _, end) in entries.items():
        if end > available:
            reading.lose(root[name].storage, _cut_short(source.name, available, announced))
    root.attributes = attributes(metadata)
    _restore_ties(root, metadata)
    told = {VERSIONS} if root.attributes else set()  # what the tree says now may change with it
    told.update(name for name in root if name not in entries)
    metadata = {key: text for key, text in metadata.items() if key not in told}
    notes = [*_noted(metadata.get("format", "pt"))]
    if available > announced:
        notes.append(after(source, start + announced, "the tensors"))
    return Document(root, NAME, source.name, source.size, metadata=metadata, notes=tuple(notes))


def _noted(form: str) -> Iterator[Finding]:
    """Who the file says that it is for, where that is not torch: transformers refuses it then."""
    if form != "pt":
        message = f"its metadata says format {form!r}, and transformers loads 'pt' into torch"
        yield Finding("metadata-format", message)


def _header(source: Source, limits: Limits) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(source.read(0, 8), "little")
    if length > limits.header_bytes:
        raise UnsafeError(
            f"announces a header of {length} bytes; more than {limits.header_bytes} are refused",
            where=source.name,
        )
    if length > source.size - 8:
        raise DamagedError(
            f"the header of {length} bytes is cut short at {source.size - 8}",
            where=source.name,
            hint="copy or download it again",
        )
    try:
        header = json.loads(source.read(8, length).decode(), object_pairs_hook=_unique)
    except UnsafeError as error:
        raise error.within(source.name) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the header is not JSON ({error})", where=source.name) from None
    if not isinstance(header, dict):
        raise DamagedError("the header is not a JSON object", where=source.name)
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise UnsafeError(f"the header holds the key {twice!r} twice")
    return found


def _is_metadata(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())


def _is_unicode(texts: Iterable[str]) -> bool:
    """Whether texts can be written as UTF-8; JSON's escapes can spell more than that."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


Entry = tuple[str, tuple[int, ...], int, int]


def _entry(name: str, entry: Any, source: Source) -> Entry:
    """dtype, shape, begin and end of one tensor, each of the right type and range."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise DamagedError(f"the header describes {name!r} wrongly", where=source.name) from None
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number < _MAX_SIZE:
            raise DamagedError(
                f"the header gives {name!r} the number {number!r}", where=source.name
            )
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise UnsupportedError(f"{name!r} has the unknown dtype {dtype!r}", where=source.name)
    return dtype, tuple(shape), begin, end


def _check_layout(entries: Mapping[str, Entry], size: int, source: str, reading: Reading) -> None:
    """Tensors follow one another from the first byte of the data to the last.

    What belongs to no tensor is for `reading` to refuse or to note; no tensor lacks it.
    """
    order = sorted(entries, key=lambda name: entries[name][2:])
    position, previous = 0, "the header"
    for name in order:
        _, _, begin, end = entries[name]
        if begin < position:
            raise UnsafeError(f"{name!r} overlaps {previous}", where=source)
        if begin > position:
            what = f"{name!r} leaves a hole after {previous}"
            reading.skip("bytes belong to no tensor", UnsafeError(what, where=source))
        position, previous = max(end, begin), repr(name)
    if position > size:
        raise _cut_short(source, size, position)
    if position < size:
        what = f"{size - position} bytes follow the last tensor"
        reading.skip("bytes belong to no tensor", DamagedError(what, where=source))


def _cut_short(source: str, size: int, announced: int) -> DamagedError:
    return DamagedError(
        f"{size} of {announced} bytes of tensors are there",
        where=source,
        hint="the file is cut short: copy or download it again",
    )


def _tensor(name: str, dtype_name: str, shape: tuple[int, ...], span: Span) -> Tensor:
    dtype = BY_SAFETENSORS[dtype_name]
    if dtype.packed > 1:
        if not shape or shape[-1] % dtype.packed:
            raise DamagedError(
                f"{name!r} of {dtype_name} does not fill whole bytes", where=span.source.name
            )
        shape = (*shape[:-1], shape[-1] // dtype.packed)
    tensor = Tensor(Storage(dtype, 0, "cpu", (span,), name), dtype, shape, contiguous_stride(shape))
    if tensor.nbytes != span.length or prod(size or 1 for size in shape) >= _MAX_SIZE:
        raise DamagedError(
            f"{name!r} of {dtype_name} and shape {list(shape)} has "
            f"{span.length} bytes instead of {tensor.nbytes}",
            where=span.source.name,
        )
    tensor.storage.numel = tensor.numel
    return tensor


def attributes(metadata: Mapping[str, str]) -> Node:
    """The attributes of a state dict that `module_versions` kept; None where there are none."""
    try:
        versions = json.loads(metadata[VERSIONS])
    except (KeyError, ValueError, RecursionError):
        return None
    if not isinstance(versions, dict):
        return None
    return {"_metadata": OrderedMap(versions)}


def _restore_ties(root: OrderedMap, metadata: Mapping[str, str]) -> None:
    for alias, kept in metadata.items():
        if alias in root or alias in _RESERVED:
            continue
        if isinstance(root.get(kept), Tensor):
            root[alias] = root[kept]


# --- writing


def write(document: Document, sink: Sink) -> None:
    """Write a state dict as safetensors.

    Every value of the root is a contiguous tensor that begins where its storage's span says (see
    `edits.flatten`). Larger alignments come first, then names, as the safetensors library orders
    them.
    """
    tensors, aliases = without_ties(document.root)
    kept = {key: text for key, text in document.metadata.items() if key != "format"}
    metadata = {"format": "pt", **kept, **aliases, **module_versions(document.root)}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    begins = {}
    for name in order:
        begins[name] = position
        position += tensors[name].nbytes
    for name, tensor in tensors.items():  # the header keeps the order of the state dict
        header[name] = description(tensor, begins[name])
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    sink.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in order:
        tensor = tensors[name]
        begin, label = tensor.offset * tensor.dtype.itemsize, repr(name)
        for part in cut(tensor.storage.spans, begin, tensor.nbytes):
            sink.copy(part, label)
    for span, label in _used_in_part(tensors):
        sink.check(span, label)


def _used_in_part(tensors: Mapping[str, Tensor]) -> Iterator[tuple[Span, str]]:
    """The spans that no tensor has for itself, each once: this container keeps no checksums."""
    checked: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.nbytes < tensor.storage.nbytes and id(tensor.storage) not in checked:
            checked.add(id(tensor.storage))
            yield from ((span, repr(name)) for span in tensor.storage.spans)


def without_ties(root: Mapping[str, Node]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, each once, and for each further name of one the name that is kept."""
    kept: dict[Any, str] = {}
    tensors, aliases = {}, {}
    for name, node in root.items():
        tensor = as_tensor(node)
        if tensor is None:
            raise UnsupportedError(f"{name!r} is not a tensor, and safetensors holds nothing else")
        if type(name) is not str or name == "__metadata__" or not _is_unicode([name]):
            raise UnsupportedError(f"{name!r} cannot be the name of a tensor in safetensors")
        alone = not tensor.numel or name in _RESERVED
        first = name if alone else kept.setdefault(tensor.view, name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return tensors, aliases


def module_versions(root: Node) -> dict[str, str]:
    """The `_metadata` of a state dict, as an entry of `__metadata__`."""
    versions = root.metadata if isinstance(root, OrderedMap) else None
    try:
        return {} if versions is None else {VERSIONS: json.dumps(versions)}
    except (TypeError, ValueError, RecursionError):
        raise UnsupportedError("its `_metadata` holds what safetensors cannot keep") from None


def description(tensor: Tensor, position: int) -> dict[str, Any]:
    """The entry of a tensor in the header; its bytes begin `position` bytes into the data."""
    shape = list(tensor.shape)
    if tensor.dtype.packed > 1:
        shape[-1] *= tensor.dtype.packed
    return {
        "dtype": tensor.dtype.safetensors,
        "shape": shape,
        "data_offsets": [position, position + tensor.nbytes],
    }


def difference(document: Document, found: Document) -> str | None:
    """Where a written file differs from the document it was made of: a key, or None.

    Names of one tensor, of one shape and dtype, have to be there; the file has no checksums to
    compare.
    """
    for key, node in document.root.items():
        meant, read_back = as_tensor(node), found.root.get(key)
        if meant is None or not isinstance(read_back, Tensor):
            return str(key)
        if (meant.dtype, meant.shape) != (read_back.dtype, read_back.shape):
            return str(key)
    surplus = [str(key) for key in found.root if key not in document.root]
    return surplus[0] if surplus else None
