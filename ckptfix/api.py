"""A checkpoint as a library user meets it: open, look, edit, save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptfix import door
from ckptfix.bytes.place import Place
from ckptfix.contents.state_dicts import choose, choose_all, find
from ckptfix.diagnose.document import diagnose
from ckptfix.edit import averages, casting, compacting, edits, reduce
from ckptfix.errors import SelectionError
from ckptfix.keys import wrappers
from ckptfix.limits import DEFAULT, Limits
from ckptfix.tree.document import Document

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import nn

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.diffs.documents import Diff
    from ckptfix.edit.casting import Cast
    from ckptfix.findings import Finding
    from ckptfix.report import Report


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The structure of a checkpoint. Edits return another one over the same bytes.

    Nothing is loaded and nothing is run: tensors are descriptions, objects of other classes are
    inert.
    """

    document: Document

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

        Raises:
            SelectionError: there is no such state dict.
            PartialPrefixError: only some keys carry `prefix`.
            KeyCollisionError: two keys would become one.
        """
        states = choose_all(self.document, [select] if isinstance(select, str) else select)
        return self._renamed(
            (state, wrappers.strip(state.mapping, prefix=prefix, partial=partial))
            for state in states
        )

    def add_prefix(self, prefix: str = "module.", *, select: str | None = None) -> Checkpoint:
        """With `prefix` before every key of its state dict. Raises `SelectionError`."""
        state = choose(self.document, select)
        return self._renamed([(state, wrappers.add(state.mapping, prefix))])

    def rename(
        self, pattern: str, replacement: str, *, select: str | Sequence[str] = ()
    ) -> Checkpoint:
        """With `re.sub(pattern, replacement, key)` for each key of its state dicts, or of `select`.

        Raises:
            RenameError: the pattern or the replacement is not valid.
            KeyCollisionError: two keys would become one.
            SelectionError: there is no such state dict.
        """
        states = choose_all(self.document, [select] if isinstance(select, str) else select)
        return self._renamed(
            (state, wrappers.substitute(state.mapping, pattern, replacement)) for state in states
        )

    def _renamed(self, renamings: Any) -> Checkpoint:
        return Checkpoint(edits.rename(self.document, renamings))

    def to_cpu(self) -> Checkpoint:
        """With every storage tagged `cpu`."""
        return Checkpoint(edits.to_cpu(self.document)[0])

    def cast(self, dtype: object, *, select: str | Sequence[str] = ()) -> Checkpoint:
        """With the floating-point tensors of its state dicts, or of `select`, cast to a dtype.

        `dtype` is a name (`float16`, `bf16`) or a `torch.dtype`. Integers stay, and so does what
        stands outside state dicts, such as an optimizer. Bytes are cast when they are saved; after
        that, `casts` says what was lost.

        Raises:
            UnsupportedError: the dtype is not one to cast to.
            SelectionError: there is no such state dict.
        """
        states = choose_all(self.document, [select] if isinstance(select, str) else select)
        return Checkpoint(casting.cast(self.document, states, casting.dtype_of(dtype)))

    @property
    def casts(self) -> list[Cast]:
        """What is cast when it is saved, each with its losses, which are known afterwards."""
        return casting.casts(self.document)

    def compact(self) -> Checkpoint:
        """With every storage cut to what its tensors use; tensors that share one still do."""
        return Checkpoint(compacting.compact(self.document)[0])

    def weights_only(self, select: str | None = None) -> Checkpoint:
        """Reduced to the tensors of one state dict, as `torch.load(weights_only=True)` loads them.

        Raises:
            SelectionError: there is no such state dict, or more than one could be meant.
            UnsupportedError: it holds a tensor of a class that `weights_only=True` refuses.
        """
        from ckptfix.edit.weights_only import weights_only

        return Checkpoint(weights_only(self.document, choose(self.document, select)).document)

    def select(self, path: str | None = None) -> Checkpoint:
        """Reduced to the state dict at `path`, or to the only one. Raises `SelectionError`."""
        return Checkpoint(reduce.only(self.document, choose(self.document, path)).document)

    def average(self, select: str | None = None) -> Checkpoint:
        """Reduced to the averages of the weights (EMA, SWA), under the names of the weights.

        Raises `SelectionError` where there are none, or several.
        """
        taken = averages.take(self.document, select)
        return Checkpoint(reduce.only(taken.document, choose(taken.document, taken.path)).document)

    def check(self, model: nn.Module, *, select: str | None = None) -> Report:
        """Whether its state dict loads into a model as it stands, and what keeps it from that.

        `loads` is what `load_state_dict(strict=True)` says of what torch gives of the file.

        Raises:
            SelectionError: there is no state dict, or several could be meant.
        """
        from ckptfix.match import choose as chooser
        from ckptfix.match import judge
        from ckptfix.match import target as targets

        wanted = targets.of_module(model)
        found, error = chooser.look(self.document, wanted, select)
        if isinstance(error, SelectionError):
            raise error
        return judge.as_it_stands(self.document, found.state, wanted)

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
            OutputExistsError: the file is there already, and `force` is not set.
            DamagedError: a byte of the input is not the one that was saved; nothing is written.
            VerifyError: the output does not read back as it should; nothing is left.
            UnsupportedError: the container cannot hold one of the tensors.
            WriteError: the file cannot be written; nothing is left behind.
        """
        source = self.document.name if Place(self.document.name).exists else ""
        output = door.resolve(path, to, source)
        fitted = reduce.fit(self.document, output.container, select)
        output.write(fitted.document, force=force, verify=verify)
        return fitted.left_out

    def save_in_place(self) -> None:
        """Make the file that it was opened from this checkpoint: only names and tags are rewritten.

        Takes as long for a large file as for a small one; the file is the old one or this one
        whatever happens. Open it again afterwards.

        Raises:
            InPlaceError: the edit needs a copy; `save` writes one.
            WriteError: the file cannot be changed, or was changed since; it is as it was.
        """
        from ckptfix.edit import inplace

        inplace.apply(inplace.prepare(self.document))


def open(path: str | os.PathLike[str], *, limits: Limits = DEFAULT) -> Checkpoint:  # noqa: A001
    """The structure of a checkpoint, in any container that ckptfix reads, whatever its extension.

    Raises:
        ReadError: the file is not a checkpoint, is damaged, unsafe or unsupported.
    """
    return Checkpoint(door.read(path, limits))


def check(path: str | os.PathLike[str], model: nn.Module, *, select: str | None = None) -> Report:
    """How the keys, shapes and dtypes in a checkpoint compare with a model's, as they stand.

    Raises:
        ReadError: the file cannot be read.
        SelectionError: there is no state dict, or more than one could be meant.
    """
    return open(path).check(model, select=select)


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

    Arguments, return value and errors are those of `Checkpoint.save`; objects of classes other than
    torch's and Python's plain ones raise `UnsupportedError`.
    """
    if not isinstance(value, Checkpoint):
        from ckptfix.torch_bridge.describe import describe

        value = Checkpoint(Document(describe(value), "memory"))
    checkpoint: Checkpoint = value
    return checkpoint.save(path, select=select, force=force, to=to, verify=verify)


def diff(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    select: str | tuple[str, str] | None = None,
    keys_only: bool = False,
    read_data: bool = False,
) -> Diff:
    """How two checkpoints differ: keys, shapes, dtypes, values, and everything beside.

    `select` names the state dict to compare, or the one of each; nothing else is compared then.
    With `keys_only` no values are. Checksums on record are believed unless `read_data` is set.

    Raises:
        ReadError: a file cannot be read.
        SelectionError: there is no such state dict, or several could be meant.
    """
    from ckptfix.diffs import documents

    one, other = (side if isinstance(side, Checkpoint) else open(side) for side in (a, b))
    paths = (select, select) if isinstance(select, str) else select
    return documents.diff(
        one.document, other.document, select=paths, keys_only=keys_only, read_data=read_data
    )
