"""A checkpoint as a library user meets it: open, look, edit, save."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ckptfix import door
from ckptfix.bytes.place import Place
from ckptfix.contents.state_dicts import choose, choose_all, find
from ckptfix.contents.tensors import as_tensor
from ckptfix.diagnose.document import diagnose
from ckptfix.edit import averages, casting, compacting, edits, optimizers, reduce
from ckptfix.errors import (
    ArgumentError,
    KeyCollisionError,
    RenameError,
    SelectionError,
    UnsupportedError,
)
from ckptfix.hints import adding
from ckptfix.keys import globs, renaming, wrappers
from ckptfix.lazy import LazyStateDict, LazyTensor
from ckptfix.limits import DEFAULT, Limits
from ckptfix.tree.document import Document, Inert, OrderedMap, Tensor
from ckptfix.tree.walk import LEAVES
from ckptfix.words import listed, size

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch
    from torch import nn

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.diffs.documents import Diff
    from ckptfix.door import File
    from ckptfix.edit.casting import Cast
    from ckptfix.edit.optimizers import Followed
    from ckptfix.findings import Finding
    from ckptfix.report import Report
    from ckptfix.torch_bridge.materialize import MapLocation


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """The structure of a checkpoint. Edits return another one over the same bytes.

    Nothing is loaded and nothing is run: tensors are descriptions, objects of other classes are
    inert.

    Example:
        >>> import ckptfix
        >>> ckptfix.open("ddp.pt").strip_prefix().to_cpu().save("out.safetensors")
        []
    """

    document: Document

    def __repr__(self) -> str:
        states = self.state_dicts
        rows = [f"  {state.path}: {state.role}, {state.contents}" for state in states[:_ROWS]]
        rows += [f"  and {len(states) - _ROWS:,} more"] if len(states) > _ROWS else []
        name, held = self.document.name, size(self.document.nbytes)
        return "\n".join([f"Checkpoint({name!r}, {self.container}, {held})", *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(state.path)}<td>{state.role}<td>{escape(state.contents)}"
            for state in self.state_dicts[:_ROWS]
        )
        found = "".join(
            f"<li>{escape(finding.code)}: {escape(finding.message)}"
            for finding in self.findings[:_ROWS]
        )
        name = f"<b>{escape(self.document.name)}</b> {escape(self.container)}"
        return f"{name}, {size(self.document.nbytes)}<table>{rows}</table><ul>{found}</ul>"

    @property
    def container(self) -> str:
        """How its bytes are wrapped: `torch zip`, `torch legacy`, `safetensors` and others."""
        return self.document.container

    @property
    def state_dicts(self) -> list[StateDict]:
        """The state dicts in it, and those of optimizers, in order."""
        return find(self.document.root)

    @property
    def findings(self) -> list[Finding]:
        """What is worth knowing about it, each with the command that repairs it."""
        return diagnose(self.document)

    def strip_prefix(
        self, prefix: str | None = None, *, partial: bool = False, select: str | Sequence[str] = ()
    ) -> Checkpoint:
        """Without wrapper components (or `prefix`) in the keys of its state dicts, or of `select`.

        Args:
            prefix: such as `module.`; None removes what wrappers (DataParallel, torch.compile,
                FSDP, …) added.
            partial: whether to strip the keys that have it even where others do not.
            select: the path of a state dict, or several; without it, all of them.

        Returns:
            Another checkpoint; versions of modules and optimizers that are keyed by name follow.

        Raises:
            SelectionError: there is no such state dict.
            PartialPrefixError: only some keys carry `prefix`.
            KeyCollisionError: two keys would become one.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("ddp.pt").strip_prefix().state_dict())
            ['0.weight', '0.bias']
        """
        states = choose_all(self.document, [select] if isinstance(select, str) else select)
        return self._renamed(
            (state, wrappers.strip(state.mapping, prefix=prefix, partial=partial))
            for state in states
        )

    def add_prefix(self, prefix: str = "module.", *, select: str | None = None) -> Checkpoint:
        """With `prefix` before every key of its state dict.

        Args:
            prefix: with or without the dot that ends it.
            select: where the state dict stands, where there are several.

        Returns:
            Another checkpoint.

        Raises:
            SelectionError: there is no such state dict, or more than one could be meant.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("model.pt").add_prefix("net").state_dict())
            ['net.0.weight', 'net.0.bias']
        """
        state = choose(self.document, select)
        return self._renamed([(state, wrappers.add(state.mapping, prefix))])

    def rename(
        self,
        pattern: str | Mapping[str, str],
        replacement: str | None = None,
        *,
        select: str | Sequence[str] = (),
    ) -> Checkpoint:
        """With `re.sub(pattern, replacement, key)` for each key of its state dicts, or of `select`.

        An optimizer that is keyed by name follows; one that is keyed by position needs nothing.

        Args:
            pattern: a regular expression; or a mapping of old keys to new ones, without
                `replacement`.
            replacement: what stands in its place, with groups as in `re.sub`.
            select: the path of a state dict, or several; without it, all of them.

        Returns:
            Another checkpoint, its keys in the same order.

        Raises:
            RenameError: the pattern or the replacement is not valid.
            KeyCollisionError: two keys would become one.
            SelectionError: there is no such state dict, or no such key.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("model.pt").rename("^0", "first").state_dict())
            ['first.weight', 'first.bias']
            >>> list(ckptfix.open("model.pt").rename({"0.bias": "offset"}).state_dict())
            ['0.weight', 'offset']
        """
        states = choose_all(self.document, [select] if isinstance(select, str) else select)
        if isinstance(pattern, str):
            if replacement is None:
                raise RenameError("a pattern wants a replacement", hint="pass both, or a mapping")
            return self._renamed(
                (state, wrappers.substitute(state.mapping, pattern, replacement))
                for state in states
            )
        there = {key for state in states for key in state.mapping}
        absent = [key for key in pattern if key not in there]
        if absent:
            raise SelectionError(
                f"has no key {absent[0]!r}", where=self.document.name, code="no-such-key"
            )
        return self._renamed(
            (state, renaming.by_mapping(state.mapping, pattern)) for state in states
        )

    def _renamed(self, renamings: Any) -> Checkpoint:
        return Checkpoint(edits.rename(self.document, renamings))

    def state_dict(self, path: str | None = None) -> LazyStateDict:
        """The tensors of one state dict by key, each read when it is asked for.

        Args:
            path: where it stands, where there are several: one of `state_dicts`.

        Returns:
            A mapping of keys to `LazyTensor`: `shape`, `dtype`, `device`, `nbytes`, `load()`, and
            slices that read only their rows.

        Raises:
            SelectionError: there is no such state dict, or more than one could be meant.

        Example:
            >>> import ckptfix
            >>> state = ckptfix.open("model.pt").state_dict()
            >>> [(key, tensor.shape) for key, tensor in state.items()]
            [('0.weight', (4, 3)), ('0.bias', (4,))]
        """
        return LazyStateDict(self.document, path)

    def tensor(
        self, key: str, *, select: str | None = None, map_location: MapLocation = "cpu"
    ) -> torch.Tensor:
        """One tensor, without reading any other.

        Args:
            key: its name in the state dict.
            select: where that stands, where there are several.
            map_location: where the tensor goes, as in `torch.load`; or `"auto"`.

        Returns:
            A torch tensor in memory of its own.

        Raises:
            SelectionError: there is no such state dict, or no such tensor in it.
            ReadError: the file cannot be read any longer, or was written to since it was opened.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("model.pt").tensor("0.bias").shape
            torch.Size([4])
        """
        return self.state_dict(select).named(key).load(map_location)

    def drop(self, *patterns: str, select: str | None = None) -> Checkpoint:
        """Without the keys that a pattern matches, in one state dict.

        An optimizer goes with its parameters; one of which that cannot be told is left out, and a
        `UserWarning` names it.

        Args:
            patterns: of whole keys; `*` is any text, dots too.
            select: where the state dict stands, where there are several.

        Returns:
            Another checkpoint.

        Raises:
            SelectionError: a pattern matches no key, or there is no such state dict.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("model.pt").drop("*.bias").state_dict())
            ['0.weight']
        """
        state = choose(self.document, select)
        gone = globs.dropped(state.mapping, patterns, self.document.name)
        return self._without(state, gone)

    def keep(self, *patterns: str, select: str | None = None) -> Checkpoint:
        """With only the keys that a pattern matches, in one state dict; otherwise as `drop`.

        Args:
            patterns: of whole keys; `*` is any text, dots too.
            select: where the state dict stands, where there are several.

        Returns:
            Another checkpoint.

        Raises:
            SelectionError: a pattern matches no key, or there is no such state dict.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("model.pt").keep("*.bias").state_dict())
            ['0.bias']
        """
        state = choose(self.document, select)
        kept = globs.matching(state.mapping, patterns, self.document.name)
        return self._without(state, state.mapping.keys() - kept)

    def _without(self, state: StateDict, gone: Collection[str]) -> Checkpoint:
        left = edits.mapping_without(state.mapping, gone)
        made = edits.with_mapping(self.document, state, left)
        return _followed(optimizers.follow(made, state, {key: key for key in left}))

    def set(self, key: str, value: object, *, select: str | None = None) -> Checkpoint:
        """With a tensor, or a plain value, under a key of one state dict.

        A new key comes last. Where a tensor is new or has another shape, no optimizer fits any
        longer: they are left out, and a `UserWarning` names them.

        Args:
            key: the name in the state dict.
            value: a torch tensor, a `LazyTensor`, or a plain value.
            select: where the state dict stands, where there are several.

        Returns:
            Another checkpoint.

        Raises:
            SelectionError: there is no such state dict, or more than one could be meant.
            UnsupportedError: the value is of a class that cannot be written.

        Example:
            >>> import ckptfix, torch
            >>> ckptfix.open("model.pt").set("0.bias", torch.ones(4)).tensor("0.bias")
            tensor([1., 1., 1., 1.])
        """
        return self._with(choose(self.document, select), {key: value})

    def merge(
        self,
        other: Checkpoint | Mapping[str, object] | File,
        *,
        select: str | None = None,
        replace: bool = False,
    ) -> Checkpoint:
        """With the keys of another state dict in one of its own; the versions of modules as well.

        Args:
            other: another checkpoint, or a path, which holds one state dict; or a state dict.
            select: where the state dict of this one stands, where there are several.
            replace: whether the other one counts where both have a key.

        Returns:
            Another checkpoint.

        Raises:
            RenameError: both have a key, and `replace` is not set.
            SelectionError: there is no state dict, or more than one could be meant.
            UnsupportedError: their numbers are in another order of bytes.

        Example:
            >>> import ckptfix, torch
            >>> merged = ckptfix.open("model.pt").merge({"head.weight": torch.ones(2, 4)})
            >>> list(merged.state_dict())
            ['0.weight', '0.bias', 'head.weight']
        """
        state = choose(self.document, select)
        if isinstance(other, Mapping):
            return self._with(state, other, replaces=replace)
        found = other if isinstance(other, Checkpoint) else open(other)
        if found.document.byteorder != self.document.byteorder:
            raise UnsupportedError(
                "has numbers in another order of bytes",
                where=found.document.name,
                hint="save both with Checkpoint.save first",
            )
        chosen = choose(found.document)
        given: dict[str, object] = {**chosen.mapping}
        return self._with(state, given, chosen.metadata, replaces=replace)

    def _with(
        self,
        state: StateDict,
        values: Mapping[str, object],
        metadata: Mapping[str, Any] | None = None,
        *,
        replaces: bool = True,
    ) -> Checkpoint:
        twice = next((key for key in values if key in state.mapping and not replaces), None)
        if twice is not None:
            hint = adding("let the other one count", "replace")
            what, where = f"both have a key {twice!r}", self.document.name
            raise RenameError(what, where=where, hint=hint, code=KeyCollisionError.code)
        given = {key: self._described(value) for key, value in values.items()}
        made = OrderedMap({**state.mapping, **given})
        versions = {**(metadata or {}), **(state.metadata or {})}
        if isinstance(state.mapping, OrderedMap):
            made.attributes = state.mapping.attributes
        if versions:
            made.attributes = {**(made.attributes or {}), "_metadata": OrderedMap(versions)}
        document = edits.with_mapping(self.document, state, made)
        old = {key: as_tensor(state.mapping.get(key)) for key in given}
        new = {key: as_tensor(node) for key, node in given.items()}
        fits = all(
            tensor is None or ((was := old[key]) is not None and was.shape == tensor.shape)
            for key, tensor in new.items()
        )
        return Checkpoint(document) if fits else _followed(optimizers.leave_out(document))

    def _described(self, value: object) -> Any:
        if isinstance(value, LazyTensor):
            return value._described(self.document.byteorder)
        if isinstance(value, (Tensor, Inert)) or type(value) in LEAVES:
            return value
        from ckptfix.torch_bridge.describe import describe

        if self.document.byteorder != sys.byteorder:
            raise UnsupportedError(
                "has numbers in another order of bytes than this machine",
                where=self.document.name,
                hint="save it with Checkpoint.save first",
            )
        return describe(value)

    def to_cpu(self) -> Checkpoint:
        """With every storage tagged `cpu`.

        Returns:
            Another checkpoint, which loads on machines without a GPU.

        Raises:
            UnsupportedError: constants of a TorchScript program are on another device.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("model.pt").to_cpu().state_dict()["0.bias"].device
            'cpu'
        """
        return Checkpoint(edits.to_cpu(self.document)[0])

    def cast(self, dtype: object, *, select: str | Sequence[str] = ()) -> Checkpoint:
        """With the floating-point tensors of its state dicts, or of `select`, cast to a dtype.

        Integers stay, and so does what stands outside state dicts, such as an optimizer. Bytes are
        cast when they are saved; after that, `casts` says what was lost.

        Args:
            dtype: a name (`float16`, `bf16`) or a `torch.dtype`.
            select: the path of a state dict, or several; without it, all of them.

        Returns:
            Another checkpoint.

        Raises:
            UnsupportedError: the dtype is not one to cast to.
            SelectionError: there is no such state dict.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("model.pt").cast("bf16").state_dict()["0.bias"].dtype
            'bfloat16'
        """
        states = choose_all(self.document, [select] if isinstance(select, str) else select)
        return Checkpoint(casting.cast(self.document, states, casting.dtype_of(dtype)))

    @property
    def casts(self) -> list[Cast]:
        """What is cast when it is saved, each with its losses, which are known afterwards."""
        return casting.casts(self.document)

    def compact(self) -> Checkpoint:
        """With every storage cut to what its tensors use; tensors that share one still do.

        Returns:
            Another checkpoint, which takes no more bytes than its tensors.

        Raises:
            UnsupportedError: it keeps another checkpoint in bytes that cannot be cut.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("model.pt").compact().save("compact.pt")
            []
        """
        return Checkpoint(compacting.compact(self.document)[0])

    def weights_only(self, select: str | None = None) -> Checkpoint:
        """Reduced to the tensors of one state dict, as `torch.load(weights_only=True)` loads them.

        Args:
            select: where the state dict stands, where there are several.

        Returns:
            Another checkpoint, of tensors and versions of modules.

        Raises:
            SelectionError: there is no such state dict, or more than one could be meant.
            UnsupportedError: it holds a tensor of a class that `weights_only=True` refuses.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("training.pt").weights_only().state_dict())
            ['0.weight', '0.bias']
        """
        from ckptfix.edit.weights_only import weights_only

        return Checkpoint(weights_only(self.document, choose(self.document, select)).document)

    def select(self, path: str | None = None) -> Checkpoint:
        """Reduced to the state dict at `path`, or to the only one.

        Args:
            path: where it stands: one of `state_dicts`.

        Returns:
            Another checkpoint, which holds that alone.

        Raises:
            SelectionError: there is no such state dict, or more than one could be meant.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("training.pt").select("model").state_dicts
            [StateDict('/', model: 2 tensors, 64 bytes)]
        """
        return Checkpoint(reduce.only(self.document, choose(self.document, path)).document)

    def average(self, select: str | None = None) -> Checkpoint:
        """Reduced to the averages of the weights (EMA, SWA), under the names of the weights.

        Args:
            select: where they stand, where there are several.

        Returns:
            Another checkpoint, which holds them alone.

        Raises:
            SelectionError: there are none, or several.

        Example:
            >>> import ckptfix
            >>> list(ckptfix.open("ema.pt").average().state_dict())
            ['0.weight', '0.bias']
        """
        taken = averages.take(self.document, select)
        return Checkpoint(reduce.only(taken.document, choose(taken.document, taken.path)).document)

    def check(self, model: nn.Module, *, select: str | None = None) -> Report:
        """Whether its state dict loads into a model as it stands, and what keeps it from that.

        Args:
            model: the module that it would be loaded into; it is not changed.
            select: where the state dict stands, where there are several.

        Returns:
            What matches and what does not. `loads` is what `load_state_dict(strict=True)` says of
            what torch gives of the file.

        Raises:
            SelectionError: there is no state dict, or several could be meant.

        Example:
            >>> import ckptfix, torch
            >>> ckptfix.open("ddp.pt").check(torch.nn.Sequential(torch.nn.Linear(3, 4))).missing
            ['0.weight', '0.bias']
        """
        from ckptfix.match import choose as chooser
        from ckptfix.match import target as targets
        from ckptfix.torch_bridge import arguments

        arguments.check(model, None, "checkpoint.check(model)")
        wanted = targets.of_module(model)
        return chooser.as_it_stands(self.document, wanted, select)[1]

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        select: str | None = None,
        force: bool = False,
        to: str | None = None,
        verify: bool = False,
    ) -> list[tuple[str, str]]:
        """Write it to a file, and read back the names and places of what that holds.

        The extension names the container, unless `to` does: `torch`, `safetensors`, `shards` or
        `dcp`.
        Bytes are held against the checksums on record while they are copied, where the container
        keeps them. Where only names or tags were edited and the file system can share blocks, the
        file shares those of the input, and they are not read.

        Args:
            path: where to write; a name that ends in `/` is a folder of shards.
            select: the path of the state dict, where the container holds one and there are several.
            force: whether to replace what is there.
            to: the container, whatever the extension says.
            verify: whether to copy in any case, and to read every byte of the output back.

        Returns:
            Path and kind of each thing that the container cannot hold and that was left out.

        Raises:
            ArgumentError: the path is none.
            OutputExistsError: the file is there already, and `force` is not set.
            DamagedError: a byte of the input is not the one that was saved; nothing is written.
            VerifyError: the output does not read back as it should; nothing is left.
            UnsupportedError: the container cannot hold one of the tensors.
            WriteError: the file cannot be written; nothing is left behind.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("training.pt").save("weights.safetensors", select="model")
            [('epoch', 'int')]
        """
        _check_path(path)
        source = self.document.name if Place(self.document.name).exists else ""
        output = door.resolve(path, to, source)
        output.check(force=force)
        fitted = reduce.fit(self.document, output.container, select)
        reduce.check_joined(fitted.document)
        around = output.around(self.document, self.document.name)
        output.write(fitted.document, force=force, verify=verify, texts=around.carried)
        return [*fitted.left_out, *around.left_out]

    def save_in_place(self) -> None:
        """Make the file that it was opened from this checkpoint: only names and tags are rewritten.

        Takes as long for a large file as for a small one; the file is the old one or this one
        whatever happens. Open it again afterwards.

        Raises:
            InPlaceError: the edit needs a copy; `save` writes one.
            WriteError: the file cannot be changed, or was changed since; it is as it was.

        Example:
            >>> import ckptfix
            >>> ckptfix.open("ddp.pt").strip_prefix().save_in_place()
        """
        from ckptfix.edit import inplace

        inplace.apply(inplace.prepare(self.document))


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        what = f"a path is wanted, not a {type(path).__name__}"
        raise ArgumentError(what, hint="call ckptfix.save(value, path), or checkpoint.save(path)")


def _followed(found: Followed) -> Checkpoint:
    """A checkpoint whose optimizers were changed, with a warning that names what was left out."""
    if found.left_out:
        paths = listed(found.left_out)
        what = f"left out {paths}: it cannot be told which of it belongs to which parameter"
        warnings.warn(f"{found.document.name}: {what}", stacklevel=4)
    return Checkpoint(found.document)


_ROWS = 6
"""State dicts, or findings, that are shown of a checkpoint."""


def open(path: File, *, limits: Limits = DEFAULT) -> Checkpoint:  # noqa: A001
    """The structure of a checkpoint, in any container that ckptfix reads, whatever its extension.

    Args:
        path: a file or a folder; or the bytes of a file, or an open file.
        limits: how much the file may ask for before it is refused; they hold for `save` as well.

    Returns:
        What is in it. Nothing is loaded, and nothing from the file is run.

    Raises:
        ReadError: the file is not a checkpoint, is damaged, unsafe or unsupported.
        ArgumentError: it is neither a path, nor bytes, nor an open file.

    Example:
        >>> import ckptfix
        >>> ckptfix.open("model.pt").state_dicts
        [StateDict('/', model: 2 tensors, 64 bytes)]
    """
    return Checkpoint(door.read(path, limits))


def check(
    model: nn.Module, path: File, *, select: str | None = None, limits: Limits = DEFAULT
) -> Report:
    """How the keys, shapes and dtypes in a checkpoint compare with a model's, as they stand.

    Args:
        model: the module that it would be loaded into; it is not changed.
        path: as in `open`.
        select: the path of the state dict, where there are several.
        limits: as in `open`.

    Returns:
        What matches and what does not; `loads` says whether the strict load takes it.

    Raises:
        ReadError: the file cannot be read.
        SelectionError: there is no state dict, or more than one could be meant.
        ArgumentError: the model is no module.

    Example:
        >>> import ckptfix, torch
        >>> ckptfix.check(torch.nn.Sequential(torch.nn.Linear(3, 4)), "model.pt")
        <All keys matched successfully>
    """
    from ckptfix.torch_bridge import arguments

    if arguments.are_swapped(model, path):
        what = "ckptfix.check takes the model first: check(model, path)"
        warnings.warn(what, DeprecationWarning, stacklevel=2)
        return check(path, model, select=select, limits=limits)  # type: ignore[arg-type]
    arguments.check(model, path, "ckptfix.check(model, path)")
    return open(path, limits=limits).check(model, select=select)


def save(
    value: Any,
    path: str | os.PathLike[str],
    *,
    select: str | None = None,
    force: bool = False,
    to: str | None = None,
    verify: bool = False,
) -> list[tuple[str, str]]:
    """Write a `Checkpoint`, or what a program holds: tensors, containers and plain values.

    Args:
        value: a `Checkpoint`; or tensors, parameters, containers, plain values of Python and numpy.
        path: where to write; a name that ends in `/` is a folder of shards.
        select: the path of the state dict, where the container holds one and there are several.
        force: whether to replace what is there.
        to: the container, whatever the extension says: `torch`, `safetensors` or `shards`.
        verify: whether to read every byte back.

    Returns:
        Path and kind of each thing that the container cannot hold and that was left out.

    Raises:
        UnsupportedError: it holds an object of another class, or what the container cannot hold.
        OutputExistsError, DamagedError, VerifyError, WriteError: as in `Checkpoint.save`.

    Example:
        >>> import ckptfix, torch
        >>> ckptfix.save({"weight": torch.ones(2, 2), "epoch": 3}, "out.safetensors", force=True)
        [('epoch', 'int')]
    """
    if not isinstance(value, Checkpoint):
        from ckptfix.torch_bridge.describe import describe

        value = Checkpoint(Document(describe(value), "memory"))
    checkpoint: Checkpoint = value
    return checkpoint.save(path, select=select, force=force, to=to, verify=verify)


def diff(
    a: File | Checkpoint,
    b: File | Checkpoint,
    *,
    select: str | tuple[str, str] | None = None,
    keys_only: bool = False,
    read_data: bool = False,
) -> Diff:
    """How two checkpoints differ: keys, shapes, dtypes, values, and everything beside.

    Args:
        a: a checkpoint, or what `open` takes.
        b: the other one.
        select: the path of the state dict to compare, or one of each; nothing else is then.
        keys_only: whether to leave values out.
        read_data: whether to read bytes whose checksums on record are equal.

    Returns:
        What differs; `same` says whether nothing does.

    Raises:
        ReadError: a file cannot be read.
        SelectionError: there is no such state dict, or several could be meant.

    Example:
        >>> import ckptfix
        >>> ckptfix.diff("model.pt", "training.pt", select=("/", "model")).same
        True
    """
    from ckptfix.diffs import documents

    one, other = (side if isinstance(side, Checkpoint) else open(side) for side in (a, b))
    for side in (one, other):
        reduce.check_one(side.document)
    paths = (select, select) if isinstance(select, str) else select
    return documents.diff(
        one.document, other.document, select=paths, keys_only=keys_only, read_data=read_data
    )
