"""Look at a document and say what is worth knowing, each thing with the command that mends it."""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import fitting, wrappers
from ckptfix import target as targets
from ckptfix.compacting import compact
from ckptfix.document import Document, Global, Tensor
from ckptfix.dtypes import BY_NAME, BY_STORAGE
from ckptfix.errors import RenameError
from ckptfix.findings import Finding
from ckptfix.formats.containers import EXTENSIONS
from ckptfix.state_dicts import StateDict, find, of_models
from ckptfix.trees import storages, walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.renaming import Renaming
    from ckptfix.target import Target


def diagnose(document: Document) -> list[Finding]:
    """Everything that ckptfix notices about a document, without a target to hold it against."""
    states = of_models(find(document.root))
    findings = [*document.notes, *_containers(document), *_devices(document)]
    for state in states:
        findings += [*_prefixes(document, state), *_ties(state)]
    findings += [*_globals(document), *_bloat(document)]
    if not states:
        findings.append(Finding("no-state-dict", "nothing in the file maps names to tensors"))
    return findings


def command(verb: str, document: Document, suffix: str, *options: str) -> str:
    """A command that can be run as it stands: `ckptfix VERB IN OUT`, OUT named after IN."""
    source = PurePath(document.name)
    target = _argument(_beside(document, suffix)) + ("/" if _is_sharded(document) else "")
    return shlex.join(["ckptfix", verb, *options, _argument(source), target])


def _beside(document: Document, suffix: str) -> PurePath:
    """A path for what is made of a document: beside it, and where it is sharded a folder."""
    source = PurePath(document.name)
    if _is_sharded(document):
        folder = source.parent if source.name.endswith(".index.json") else source
        plain = folder.name.strip(".") != ""
        return folder.with_name(f"{folder.name}.{suffix}") if plain else folder / ".." / suffix
    extension = source.suffix if source.suffix.lower() in EXTENSIONS else ".pt"
    if document.container == "safetensors":
        extension = ".safetensors"
    name = f"{source.stem}.{suffix}{extension}"
    return source.with_name(name) if source.name else PurePath("..", f"{suffix}{extension}")


def _is_sharded(document: Document) -> bool:
    return document.container.startswith("sharded")


def _argument(path: PurePath) -> str:
    """A path as an argument: one that begins with a dash would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _containers(document: Document) -> Iterator[Finding]:
    extension = PurePath(document.name).suffix.lower()
    is_safetensors = document.container == "safetensors"
    if _is_sharded(document):
        return
    if extension in EXTENSIONS and is_safetensors != (extension == ".safetensors"):
        right = PurePath(document.name).with_suffix(".safetensors" if is_safetensors else ".pt")
        yield Finding(
            "wrong-extension",
            f"named {extension}, but the bytes are {document.container}",
            command=shlex.join(["mv", _argument(PurePath(document.name)), _argument(right)]),
        )


def _devices(document: Document) -> Iterator[Finding]:
    tags = Counter(storage.device for storage in storages(document.root))
    away = [tag for tag in tags if tag != "cpu"]
    if away:
        yield Finding(
            "device-tag",
            f"{tags.total() - tags['cpu']} of {tags.total()} storages are tagged "
            f"{', '.join(away)}: torch.load fails where there is no such device",
            command=command("to-cpu", document, "cpu"),
        )


def _prefixes(document: Document, state: StateDict) -> Iterator[Finding]:
    seen = wrappers.detect(state.mapping)
    select = () if state.path == "/" else ("--select", state.path)
    strip = command("strip-prefix", document, "stripped", *select) if state.origin is None else ""
    if seen.collision is not None:
        first, second = seen.collision
        yield Finding("key-collision", f"{first!r} and {second!r} would become one", state.path)
        strip = ""
    if seen.leading:
        prefix = ".".join((*seen.leading, ""))
        names = ", ".join(wrappers.WRAPPERS[part] for part in seen.leading)
        message = f"all {len(state.mapping)} keys begin with {prefix!r} (added by {names})"
        yield Finding("prefix-wrapper", message, state.path, strip or None)
    if seen.layout == "swa":
        message = "averaged weights: load them into torch.optim.swa_utils.AveragedModel"
        yield Finding("swa-layout", message, state.path)
    elif seen.own_child:
        carrying, lacking = seen.carrying, seen.lacking
        message = (
            f"{len(carrying)} of {len(carrying) + len(lacking)} keys begin with 'module.': "
            f"{carrying[0]!r} does, {lacking[0]!r} does not, so it is left alone"
        )
        yield Finding("partial-prefix", message, state.path)
    for name, count in seen.inside.items():
        if name in wrappers.ANYWHERE:
            message = f"{count} keys hold {name!r} (added by {wrappers.WRAPPERS[name]})"
            yield Finding("wrapper-inside", message, state.path, strip or None)


def _ties(state: StateDict) -> Iterator[Finding]:
    groups = state.ties
    if groups:
        shown = " = ".join(groups[0])
        more = f", and {len(groups) - 1} more" if len(groups) > 1 else ""
        yield Finding("tied-tensors", f"one tensor, several names: {shown}{more}", state.path)


def wasted(document: Document) -> int:
    """Bytes of storages that no tensor reaches, counting each tensor's elements once."""
    used: dict[int, dict[object, int]] = {}
    sizes: dict[int, int] = {}
    for _, node in walk(document.root):
        if isinstance(node, Tensor):
            views = used.setdefault(id(node.storage), {})
            views[node.view] = _reach(node)
            sizes[id(node.storage)] = node.storage.nbytes
    return sum(max(size - sum(used[key].values()), 0) for key, size in sizes.items())


def _reach(tensor: Tensor) -> int:
    """Distinct bytes that a view touches at most: expanded dimensions repeat theirs."""
    count = tensor.dtype.itemsize
    for size, stride in zip(tensor.shape, tensor.stride, strict=True):
        count *= size if stride or not size else 1
    return count


def _bloat(document: Document) -> Iterator[Finding]:
    waste = wasted(document)
    if waste > 4096:
        yield Finding(
            "view-bloat",
            f"{waste} bytes belong to storages of which only a part is used",
            command=command("convert", document, "compact", "--compact")
            if compact(document)[1]
            else None,
        )


# --- classes


def globals_of(document: Document) -> list[Global]:
    """Every class and function that the pickle names, apart from torch's own tensors; sorted."""
    return sorted({node for _, node in walk(document.root) if type(node) is Global})


def _globals(document: Document) -> Iterator[Finding]:
    refused = [name.today for name in globals_of(document) if not is_allowed(name)]
    if refused:
        shown = ", ".join(refused[:5]) + (f", and {len(refused) - 5} more" if refused[5:] else "")
        yield Finding(
            "blocked-globals",
            f"torch.load(weights_only=True) refuses {shown}; ckptfix reads without running them",
        )


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


# --- against a target


class Remedy(NamedTuple):
    """What would make a state dict fit a target: in words, and as a command where there is one."""

    message: str
    command: str | None


def remedy(document: Document, state: StateDict, wanted: Target) -> Remedy | None:
    """What makes the keys of a state dict those of the target; None where no renaming does."""
    ways = fitting.fits(state.mapping, wanted.specs_for(state))
    if len(ways) > 1:
        listed = "; ".join(way.label for way in ways)
        return Remedy(f"The keys fit in {len(ways)} ways: {listed}.", None)
    if not ways or not targets.report(state, wanted, ways[0]).loads:
        return None
    select = () if state.path == "/" else ("--select", state.path)
    found = _command_for(ways[0], document, state, select)
    if found is None:
        message = (
            f"They match once renamed ({ways[0].label}): ckptfix.load_into(model, path) does it."
        )
        return Remedy(message, None)
    return Remedy(f"They match once renamed ({ways[0].label}):", found)


def _command_for(
    way: Renaming, document: Document, state: StateDict, select: tuple[str, ...]
) -> str | None:
    """The command that renames exactly as `way` does."""
    keys = state.mapping
    with contextlib.suppress(RenameError):
        if wrappers.strip(keys).keys == way.keys:
            return command("strip-prefix", document, "stripped", *select)
        if way.removed and wrappers.strip(keys, prefix=way.removed).keys == way.keys:
            return command("strip-prefix", document, "stripped", "--prefix", way.removed, *select)
    if way.added and wrappers.add(keys, way.added).keys == way.keys:
        return command("add-prefix", document, "prefixed", "--prefix", way.added, *select)
    return None
