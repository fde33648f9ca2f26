"""Look at a document and say what is worth knowing, each thing with the command that repairs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.place import unused
from ckptfix.contents.foreign import framework_of
from ckptfix.contents.modules import unwrapped
from ckptfix.contents.packed import packed_weights, placeholders, without_bytes
from ckptfix.contents.state_dicts import StateDict, find, instead, of_models
from ckptfix.contents.tensors import device_tags
from ckptfix.door import beside, fixing_for_a_model, is_sharded, taking
from ckptfix.edit import flat
from ckptfix.edit.compacting import compact
from ckptfix.findings import Finding
from ckptfix.formats import embedded
from ckptfix.formats.table import EXTENSIONS, split_extension
from ckptfix.hints import command, shell
from ckptfix.keys import wrappers
from ckptfix.layouts import in_pieces
from ckptfix.pickles.allowed import is_allowed
from ckptfix.pickles.dangerous import dangers, name_of, unknown_calls
from ckptfix.tree.document import Document, Global, Inert, Tensor
from ckptfix.tree.walk import script_constants, walk
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator


def diagnose(document: Document) -> list[Finding]:
    """Everything that ckptfix notices about a document, without a target to hold it against."""
    states = of_models(find(document.root))
    findings = [*_noted(document), *_containers(document), *_devices(document)]
    for state in states:
        framework = framework_of(state.mapping)
        if framework is not None:
            message = f"of {framework}, which keeps the weight of each Linear transposed"
            findings.append(Finding("other-framework", message, state.path))
        findings += [*_prefixes(document, state), *_ties(state), *_unknown(state)]
        findings += _perhaps_tied(document, state)
        findings += list(_flat(document, state)) or list(without_weights(state))
    findings += [*_globals(document), *_bloat(document), *_constants(document)]
    findings += _embedded(document)
    if not states:
        other = instead(document)
        message = f"it holds {other}" if other else "nothing in the file maps names to tensors"
        findings.append(Finding("no-state-dict", message))
    return findings


def _noted(document: Document) -> Iterator[Finding]:
    """What was noticed while reading; where writing the document anew repairs it, the command."""
    anew = command("convert", document.name, beside(document, "repacked"))
    fix = fixing_for_a_model(document)
    commands = {**dict.fromkeys(_ANEW, anew), "tensor-parallel": fix}
    for note in document.notes:
        yield note._replace(command=commands.get(note.code))


_ANEW = frozenset(
    {"container-refused", "old-container", "hidden-call", "left-on-stack", "metadata-format"}
)


def _containers(document: Document) -> Iterator[Finding]:
    if any(note.code == "container-refused" for note in document.notes):
        return  # its name is that of what lies around it
    stem, extension = split_extension(document.name)
    is_safetensors = document.container == "safetensors"
    if is_sharded(document):
        return
    extension = extension.lower()
    if extension in EXTENSIONS and is_safetensors != (extension == ".safetensors"):
        right = unused(stem, ".safetensors" if is_safetensors else ".pt")
        yield Finding(
            "wrong-extension",
            f"named {extension}, but the bytes are {document.container}",
            command=shell("mv", files=[document.name, right]),
        )


def _constants(document: Document) -> Iterator[Finding]:
    tensors = script_constants(document)
    if tensors:
        size = sum(tensor.nbytes for tensor in tensors)
        shown = listed((f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors), 8)
        message = f"{len(tensors)} tensors of {size} bytes are constants of the program: {shown}"
        yield Finding("script-constants", message)


def _embedded(document: Document) -> Iterator[Finding]:
    for path, inner in embedded.places(document):
        tensors = sum(isinstance(node, Tensor) for _, node in walk(inner.root))
        message = f"these bytes are a checkpoint of {tensors} tensors, which no edit reaches"
        yield Finding("checkpoint-in-bytes", message, path, taking(document, path))


def _devices(document: Document) -> Iterator[Finding]:
    tags = device_tags(document.root)
    away = [tag for tag in tags if tag != "cpu"]
    if away:
        yield Finding(
            "device-tag",
            f"{tags.total() - tags['cpu']} of {tags.total()} storages are tagged "
            f"{', '.join(away)}: torch.load fails where there is no such device",
            command=command("to-cpu", document.name, beside(document, "cpu")),
        )


def _prefixes(document: Document, state: StateDict) -> Iterator[Finding]:
    seen = wrappers.detect(state.mapping)
    strip = None
    if state.origin is None and seen.collision is None:
        out = beside(document, "stripped")
        strip = command("strip-prefix", document.name, out, select=state.selection)
    elif isinstance(state.origin, Inert) and unwrapped(state.origin) is not state.origin:
        strip = command("fix", document.name, beside(document, "fixed"))
    if seen.collision is not None:
        first, second = seen.collision
        yield Finding("key-collision", f"{first!r} and {second!r} would become one", state.path)
    if seen.leading:
        prefix = ".".join((*seen.leading, ""))
        names = ", ".join(wrappers.WRAPPERS[part] for part in seen.leading)
        message = f"all {len(state.mapping)} keys begin with {prefix!r} (added by {names})"
        yield Finding("prefix-wrapper", message, state.path, strip)
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
            yield Finding("wrapper-inside", message, state.path, strip)


def without_weights(state: StateDict) -> Iterator[Finding]:
    """Weights that are not there, whatever is done to the file."""
    told = (
        ("meta-tensors", without_bytes(state.mapping), "no bytes: saved while offloaded"),
        ("placeholders", placeholders(state.mapping), "no elements: placeholders of ZeRO-3"),
        ("packed-weights", packed_weights(state.mapping), "packed values: saved quantized"),
    )
    for code, keys, what in told:
        if keys:
            verb = "tensor has" if len(keys) == 1 else "tensors have"
            yield Finding(code, f"{len(keys)} {verb} {what} ({listed(keys)})", state.path)


def _ties(state: StateDict) -> Iterator[Finding]:
    groups = state.ties
    if groups:
        shown = " = ".join(groups[0])
        more = f", and {len(groups) - 1} more" if len(groups) > 1 else ""
        yield Finding("tied-tensors", f"one tensor, several names: {shown}{more}", state.path)


def _perhaps_tied(document: Document, state: StateDict) -> Iterator[Finding]:
    """Matrices of a DCP folder that are equal by their checksums: DCP loses that they were one."""
    if document.container != in_pieces.DCP:
        return
    groups: dict[object, list[str]] = {}
    for key, tensor in state.tensors.items():
        sums = tuple((span.length, span.crc) for span in tensor.storage.spans)
        if len(tensor.shape) > 1 and tensor.numel and all(crc is not None for _, crc in sums):
            groups.setdefault((tensor.dtype.name, tensor.shape, sums), []).append(key)
    pairs = [" = ".join(keys) for keys in groups.values() if len(keys) == 2]
    if pairs:
        message = f"equal by their checksums, and perhaps one tensor: {listed(pairs)}"
        yield Finding("tied-tensors", message, state.path)


def _unknown(state: StateDict) -> Iterator[Finding]:
    if state.unknown:
        names = listed((f"{path} ({cls})" for path, cls in state.unknown.items()), 4)
        yield Finding("unknown-state", f"what these parts hold is not known: {names}", state.path)


def _flat(document: Document, state: StateDict) -> Iterator[Finding]:
    keys = flat.flat_in(state.mapping)
    if keys:
        message = f"parameters lie flat in {listed(keys)}: their shapes are not in the file"
        fix = fixing_for_a_model(document, state.selection)
        yield Finding("flat-parameters", message, state.path, fix)


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
            command=command("convert", document.name, beside(document, "compact"), compact=True)
            if compact(document)[1]
            else None,
        )


# --- classes


def globals_of(document: Document) -> list[Global]:
    """Every class and function that the pickle names, apart from torch's own tensors; sorted."""
    return sorted({node for _, node in walk(document.root) if type(node) is Global})


def _globals(document: Document) -> Iterator[Finding]:
    calls = dict.fromkeys(map(name_of, dangers(document.root)))
    if calls:
        yield Finding(
            "dangerous-globals",
            f"names {listed(calls)}, which would run or reach out where it is unpickled, or which "
            "no checkpoint calls; ckptfix reads without running it",
            command=command("fix", document.name, beside(document, "fixed")),
        )
    unknown = dict.fromkeys(map(name_of, unknown_calls(document.root)))
    if unknown:
        yield Finding(
            "unknown-calls",
            f"calls {listed(unknown)}: what that does where it is unpickled is not known; "
            "ckptfix reads without calling it",
        )
    names = (name for name in globals_of(document) if not is_allowed(name))
    refused = [name.today for name in names if name.today not in calls]
    if refused:
        yield Finding(
            "blocked-globals",
            f"torch.load(weights_only=True) refuses {listed(refused)}; "
            "ckptfix reads without running them",
        )
