"""What ckptfix notices: one record, and the one table of codes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ckptfix.hints import Command


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    """The checkpoint does not load, or not rightly, until it is repaired."""
    WARNING = "warning"
    """It loads somewhere, and fails or misleads elsewhere."""
    NOTE = "note"
    """Worth knowing; nothing is wrong."""


class Meaning(NamedTuple):
    """What a code stands for."""

    severity: Severity
    meaning: str
    cure: str


_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

CODES: dict[str, Meaning] = {
    "prefix-wrapper": Meaning(
        _WARNING, "every key begins with a name that a wrapper added", "`ckptfix strip-prefix`"
    ),
    "wrapper-inside": Meaning(
        _WARNING, "keys hold a wrapper's name further inside", "`ckptfix strip-prefix`"
    ),
    "partial-prefix": Meaning(
        _NOTE,
        "some keys begin with `module`, others do not: a child of the model's own",
        "none needed; `ckptfix strip-prefix --partial` where it is a wrapper after all",
    ),
    "key-collision": Meaning(
        _ERROR, "keys that would become one without their wrapper's name", "`ckptfix rename`"
    ),
    "swa-layout": Meaning(
        _NOTE,
        "averaged weights: `module.*` beside `n_averaged`",
        "load them into `AveragedModel`, or `ckptfix fix --model`",
    ),
    "device-tag": Meaning(
        _WARNING, "storages are tagged with a device other than the CPU", "`ckptfix to-cpu`"
    ),
    "blocked-globals": Meaning(
        _WARNING,
        "`weights_only=True` refuses classes that the file names",
        "`ckptfix convert --weights-only`",
    ),
    "dangerous-globals": Meaning(
        _ERROR,
        "the file calls what runs commands or code, or reaches files or the network",
        "`ckptfix fix` leaves it out; ask where the file comes from",
    ),
    "unknown-calls": Meaning(
        _WARNING,
        "the file calls functions of other packages, of which nobody knows what they do",
        "`ckptfix convert --weights-only` leaves them out; ask where the file comes from",
    ),
    "hidden-call": Meaning(
        _ERROR,
        "the pickle calls what is no part of the checkpoint, as injected code does",
        "`ckptfix convert` leaves it behind; ask where the file comes from",
    ),
    "left-on-stack": Meaning(
        _WARNING,
        "the pickle leaves values behind, of which unpicklers take the last",
        "`ckptfix convert` writes the last",
    ),
    "container-refused": Meaning(
        _ERROR,
        "`torch.load` does not take the checkpoint as it is packed",
        "`ckptfix convert` packs it as torch does",
    ),
    "old-container": Meaning(
        _WARNING,
        "`torch.load` does not take the container by default",
        "`ckptfix convert` packs it as torch does today",
    ),
    "metadata-format": Meaning(
        _WARNING,
        "the metadata of a safetensors file names another framework than torch (`np`, `mlx`)",
        "`ckptfix convert` writes `pt`",
    ),
    "view-bloat": Meaning(
        _WARNING,
        "storages are larger than the tensors that use them",
        "`ckptfix convert --compact`",
    ),
    "meta-tensors": Meaning(
        _ERROR,
        "tensors without bytes: they were saved while they were offloaded",
        "none; save it again where all weights are in memory",
    ),
    "placeholders": Meaning(
        _ERROR,
        "empty tensors stand for weights, as DeepSpeed ZeRO-3 leaves them",
        "none; run `zero_to_fp32.py` in the folder that training saved",
    ),
    "packed-weights": Meaning(
        _WARNING,
        "weights are quantized and packed: only the library that did it loads them",
        "none; dequantize them there",
    ),
    "numpy-arrays": Meaning(
        _ERROR,
        "numpy arrays, or tensors of a TPU, where a model wants tensors (`fix --model`)",
        "`ckptfix fix --model`",
    ),
    "tied-tensors": Meaning(
        _NOTE, "several names for one tensor", "none needed; every container keeps them"
    ),
    "no-checksums": Meaning(
        _NOTE, "the archive was saved without checksums", "`ckptfix convert` gives it some"
    ),
    "rolled-back": Meaning(
        _NOTE,
        "an edit in place had been interrupted, and was undone",
        "none needed; run the edit again",
    ),
    "several-saves": Meaning(
        _ERROR,
        "another save follows the end of the checkpoint, and is not read",
        "none; take the rest into a file of its own (`dd`)",
    ),
    "trailing-bytes": Meaning(
        _WARNING, "bytes follow the end of the checkpoint", "`ckptfix convert` leaves them behind"
    ),
    "unused-records": Meaning(
        _WARNING,
        "storages in the archive that nothing refers to",
        "`ckptfix convert` leaves them behind",
    ),
    "surplus-shard": Meaning(
        _WARNING, "files beside the shards or pieces that nothing names", "remove them"
    ),
    "flat-parameters": Meaning(
        _ERROR,
        "parameters of FSDP1 lie flat, one after another; their shapes are not in the file",
        "`ckptfix fix --model` or `--like`, which have the shapes",
    ),
    "tensor-parallel": Meaning(
        _WARNING,
        "files of several ranks of tensor parallelism: each has a slice of most tensors",
        "`ckptfix fix --model` or `--like`, whose shapes say how they are joined",
    ),
    "ranks-differ": Meaning(
        _NOTE,
        "values of which each rank had its own: states of random number generators, and what an "
        "optimizer keeps of flat parameters",
        "none needed; that of the lowest rank is kept, and the optimizer's is left out",
    ),
    "end-unproven": Meaning(
        _NOTE,
        "the pieces fit together, but nothing says that none is missing at the end",
        "none needed where `ckptfix check --like` or `--model` finds the shapes right",
    ),
    "twin-differs": Meaning(
        _WARNING,
        "the same checkpoint lies beside it in another container, and differs",
        "remove the one that is out of date",
    ),
    "files-beside": Meaning(
        _NOTE,
        "other checkpoints in the folder: averages, an adapter, an optimizer",
        "none needed; give the file itself to read it",
    ),
    "twin-beside": Meaning(
        _NOTE,
        "the same checkpoint lies beside it in another container, and was not compared",
        "`ckptfix diff` compares the values",
    ),
    "wrong-extension": Meaning(
        _WARNING, "the name says another container than the bytes do", "rename the file"
    ),
    "no-state-dict": Meaning(
        _WARNING,
        "nothing in the file maps names to tensors, as in that of an optimizer",
        "none; look for another file if weights should be there",
    ),
    "checkpoint-in-bytes": Meaning(
        _WARNING,
        "the bytes of another checkpoint are kept as a value (skorch)",
        "`ckptfix convert --select` takes it out",
    ),
    "script-constants": Meaning(
        _WARNING,
        "a TorchScript program holds tensors as constants, without names, as a frozen one does",
        "none; `torch.jit.load` runs it, and the model before it was frozen has the names",
    ),
    "unknown-state": Meaning(
        _ERROR,
        "a pickled model has parts that keep their weights in a way that is not known",
        "save its `state_dict()` in the program that made it",
    ),
    "crc-mismatch": Meaning(
        _ERROR,
        "bytes are not those that were saved (`check --read-data`)",
        "copy the file again, or `ckptfix recover`",
    ),
    "nan-values": Meaning(
        _WARNING,
        "tensors hold NaN (`check --read-data`)",
        "take an earlier checkpoint; the training had diverged",
    ),
    "inf-values": Meaning(
        _WARNING,
        "tensors hold infinities (`check --read-data`)",
        "take an earlier checkpoint, or one of a wider dtype",
    ),
    "unexpected-keys": Meaning(
        _NOTE, "keys that the target does not have (`fix`)", "dropped, and named"
    ),
    "values-change": Meaning(
        _WARNING,
        "the model has a dtype that does not hold the values of the file: imaginary parts, "
        "fractions or large numbers are lost as torch loads them (`check`, `fix`, the loaders)",
        "build the model with the dtype of the file",
    ),
    "unseen-transpose": Meaning(
        _NOTE,
        "square weights of layers that keep them as `[in, out]` in one program, and turned round "
        "in another (`check`, `fix`)",
        "look where they come from",
    ),
    "other-framework": Meaning(
        _ERROR,
        "a state dict of PaddlePaddle, which keeps the weight of each Linear transposed",
        "look for a file for torch",
    ),
    "dropped-keys": Meaning(_NOTE, "keys that `--drop` names (`fix`)", "dropped, and named"),
    "pruned-weights": Meaning(
        _NOTE,
        "weights beside the masks of `torch.nn.utils.prune` (`fix --apply-masks`)",
        "multiplied by them",
    ),
    "optimizer-state": Meaning(
        _NOTE,
        "the optimizer has parameters that were dropped, or in another order (`fix`)",
        "it follows the parameters, or is left out, and named",
    ),
    "averaged-copy": Meaning(
        _NOTE,
        "averages of the weights fit as well (`fix --model`)",
        "not taken; `--average` takes them, `--select` one of several",
    ),
    "nested": Meaning(
        _NOTE,
        "the state dict lies inside a training checkpoint (`fix --model`)",
        "taken out; `--keep-training-state` leaves it there",
    ),
}
"""Severity, meaning and cure of the code of each finding."""


def with_errors() -> dict[str, Meaning]:
    """The same with the errors that `explain` knows; `docs/findings.md` is this table.

    Some of those are noticed in files, too, and stand here as that.
    """
    from ckptfix.known_errors import KNOWN  # late, since only `explain` and the docs need them

    return {known.code: Meaning(_ERROR, known.cause, known.said) for known in KNOWN} | CODES


def as_markdown() -> str:
    """The table, as `docs/findings.md` has it."""
    codes = CODES | with_errors()
    rows = ["| code | severity | meaning | cure |", "|---|---|---|---|"]
    rows += [
        f"| `{code}` | {row.severity} | {row.meaning} | {row.cure} |" for code, row in codes.items()
    ]
    return "\n".join(rows)


class Finding(NamedTuple):
    """One thing that was noticed: what, where, and the command that repairs it."""

    code: str
    message: str
    where: str = "/"
    command: Command | None = None

    @property
    def severity(self) -> Severity:
        """How much it matters; the table decides."""
        return CODES[self.code].severity

    def as_dict(self) -> dict[str, str | None]:
        """The same for JSON."""
        return {
            "code": self.code,
            "severity": self.severity,
            "where": self.where,
            "message": self.message,
            "command": None if self.command is None else str(self.command),
        }
