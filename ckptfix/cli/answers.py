"""What each verb answers under `--json`: one object on one line for each file that it was given.

An answer has the fields of `Answer` and those of its verb, whatever the exit code: what is not
known is null, or empty. `docs/json.md` is made of these types, and tests hold every answer to them.
Verbs know them as types alone, so that nothing of this costs time where nobody asks for JSON.
"""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

SCHEMA = 2
"""Within a schema fields are only ever added."""


class Error(TypedDict):
    """Why something could not be done, or what is damaged."""

    code: Annotated[str, "what to test for: `not-a-checkpoint`, `output-exists`, `usage`, …"]
    message: Annotated[str, "what happened, in one line"]
    where: Annotated[str | None, "the file, and the place in it"]
    details: Annotated[list[str], "more lines, such as the keys that do not match"]
    hint: Annotated[str | None, "what may help, for people; it contains `command`"]
    command: Annotated[str | None, "the command that may help, as a line of shell"]


class Finding(TypedDict):
    """One thing that was noticed; [findings](findings.md) lists them all."""

    code: Annotated[str, "what to test for"]
    severity: Annotated[Literal["error", "warning", "note"], "how much it matters"]
    where: Annotated[str, "the state dict or the tensor; `/` is the file itself"]
    message: Annotated[str, "what was noticed"]
    command: Annotated[str | None, "the command that repairs it, as a line of shell"]


class Answer(TypedDict):
    """What every verb answers."""

    schema: Annotated[Literal[2], "the version of this page"]
    command: Annotated[
        str | None, "the verb; null where the first word is none, and then no other field is there"
    ]
    input: Annotated[str | None, "the file or folder that was read, as it was given"]
    output: Annotated[
        str | None, "what was written, or would be (`dry_run`); null where nothing was"
    ]
    exit_code: Annotated[int, "0 done, or yes; 1 no; 2 it could not be done. Of this file alone"]
    error: Annotated[Error | None, "null unless something is damaged or could not be done"]
    notes: Annotated[list[str], "what is told to people beside the answer"]


# --- inspect


class Tensor(TypedDict):
    """A tensor of a state dict."""

    key: Annotated[str, "its name"]
    shape: Annotated[list[int], "its sizes"]
    dtype: Annotated[str, "as torch calls it, without `torch.`"]
    bytes: Annotated[int, "its elements times their size"]
    device: Annotated[str, "that it was saved from"]


class StateDict(TypedDict):
    """A state dict in a checkpoint."""

    path: Annotated[str, "where it is: what `--select` takes; `/` is the checkpoint itself"]
    role: Annotated[
        Literal["model", "ema", "swa", "optimizer", "generators", "loose"],
        "`loose`: tensors that stand in no state dict",
    ]
    prefix: Annotated[str, "what a wrapper put before every key, such as `module.`"]
    ties: Annotated[list[list[str]], "keys that name one tensor"]
    tensors: Annotated[list[Tensor], "in the order of the file"]
    others: Annotated[dict[str, str], "what else it holds: key and kind"]


class Inspect(TypedDict):
    """With `--html`, only `output` is filled in."""

    container: Annotated[str | None, "how the file is packed, such as `torch zip`"]
    bytes: Annotated[int | None, "size of the file, or of all its files"]
    byteorder: Annotated[str | None, "`little` or `big`"]
    metadata: Annotated[dict[str, str], "texts of a safetensors header"]
    devices: Annotated[dict[str, int], "device, and how many storages were saved from it"]
    wasted_bytes: Annotated[int | None, "of storages, which no tensor uses"]
    globals: Annotated[list[str], "classes and functions that the pickle names"]
    state_dicts: Annotated[list[StateDict], "of models and optimizers"]
    findings: Annotated[list[Finding], "what was noticed"]


# --- check


class Data(TypedDict):
    """What `--read-data` has shown."""

    verified: Annotated[int, "storages with the checksum on record"]
    unverified: Annotated[int, "storages of which the container keeps no checksum"]
    damaged: Annotated[list[str], "storages with another checksum, and where each is"]
    nan: Annotated[dict[str, int], "tensors that hold NaN, and how many"]
    inf: Annotated[dict[str, int], "tensors that hold infinities, and how many"]


class Spec(TypedDict):
    """What lies under a key."""

    shape: Annotated[list[int] | None, "null: no tensor"]
    dtype: Annotated[str | None, "null: no tensor"]
    kind: Annotated[str, "empty for a dense tensor; `sparse_coo`, `meta`, `numpy array`, …"]


class Difference(TypedDict):
    """A key that is in both, and differs."""

    key: Annotated[str, "its name"]
    found: Annotated[Spec, "what the file has"]
    wanted: Annotated[Spec, "what the model has"]


class Remedy(TypedDict):
    """What makes it load."""

    message: Annotated[str, "in words; or why nothing does"]
    command: Annotated[str | None, "as a line of shell, where there is one"]


class Check(TypedDict):
    """From `target` on about the model, and empty without one."""

    container: Annotated[str | None, "how the file is packed"]
    sound: Annotated[bool | None, "whether it is whole; null where that could not be told"]
    findings: Annotated[list[Finding], "what was noticed"]
    data: Annotated[Data | None, "what `--read-data` has shown"]
    target: Annotated[str | None, "`--model` or `--like`, as it was given"]
    state_dict: Annotated[str | None, "path of the state dict that was compared"]
    loads: Annotated[bool | None, "whether `load_state_dict(strict=True)` takes it as it stands"]
    share: Annotated[float | None, "of the model's elements that would be loaded, from 0 to 1"]
    matched: Annotated[list[str], "keys that are in both, of one shape"]
    missing: Annotated[list[str], "keys that only the model has"]
    missing_buffers: Annotated[list[str], "those of them that the model computes"]
    forgiven: Annotated[list[str], "missing keys that the model's own loader passes over"]
    unexpected: Annotated[list[str], "keys that only the file has"]
    shape_mismatch: Annotated[list[Difference], "keys of another shape"]
    kind_mismatch: Annotated[list[Difference], "keys of another kind, such as sparse ones"]
    dtype_difference: Annotated[list[Difference], "keys of another dtype, which torch casts"]
    refusals: Annotated[list[str], "why else it does not load"]
    elements_left_at_random: Annotated[int | None, "what `strict=False` would not load"]
    remedy: Annotated[Remedy | None, "null where it loads"]


# --- the verbs that write


class LeftOut(TypedDict):
    """What the output does not have."""

    path: Annotated[str, "where it stood"]
    kind: Annotated[str, "what it was, such as `dict of 2`"]


class Written(TypedDict):
    """What every verb that writes answers besides."""

    dry_run: Annotated[bool, "nothing was written, as was asked"]
    in_place: Annotated[bool, "`input` was changed itself"]
    done: Annotated[str | None, "what was done, or why there was nothing to do, in one line"]
    container: Annotated[str | None, "how `input` is packed"]
    output_container: Annotated[str | None, "how `output` is packed"]
    bytes: Annotated[
        Literal["checked", "copied", "shared", "verified"] | None,
        "what is known of the bytes: held against checksums; copied, there are none; shared by "
        "the file system, not read; read back. Null where none were written",
    ]
    left_out: Annotated[list[LeftOut], "what the output does not have"]
    written_once: Annotated[dict[str, str], "tied keys that safetensors holds as another one"]
    carried: Annotated[
        list[str], "files beside the input that go into an output folder as they are"
    ]
    removed: Annotated[list[str], "files of the checkpoint that was there, replaced or removed"]


class Renamed(TypedDict):
    """What became of the keys of a state dict."""

    path: Annotated[str, "the state dict"]
    removed: Annotated[str, "the prefix that was taken off, where one tells it"]
    added: Annotated[str, "the prefix that was put on, where one tells it"]
    keys: Annotated[dict[str, str], "old keys and new ones"]


class Renames(Written):
    """What the verbs that rename keys answer."""

    renamed: Annotated[list[Renamed], "state dicts of which keys were renamed"]


class ToCpu(Written):
    """What `to-cpu` answers."""

    retagged: Annotated[dict[str, int], "device, and how many storages were tagged with it"]


class Cast(TypedDict):
    """One tensor that was cast."""

    keys: Annotated[list[str], "its names"]
    dtype: Annotated[str, "that it had"]
    elements: Annotated[int, "how many"]
    overflow: Annotated[int, "values beyond the range of the new dtype"]
    underflow: Annotated[int, "values too small for it, which are zero now"]
    nan: Annotated[int, "values that are NaN, before and after"]


class Casts(TypedDict):
    """What `--dtype` did."""

    dtype: Annotated[str, "that tensors were cast to"]
    tensors: Annotated[list[Cast], "that were cast"]
    not_cast: Annotated[list[str], "others of floating-point numbers"]


class Convert(Written):
    """What `convert` answers."""

    saved_bytes: Annotated[int | None, "of unused storage, with `--compact`"]
    cast: Annotated[Casts | None, "with `--dtype`"]


class Cure(TypedDict):
    """One thing that was repaired."""

    code: Annotated[str, "of the finding"]
    where: Annotated[str, "the state dict or the tensor"]
    message: Annotated[str, "what was found"]
    cure: Annotated[str, "what was done"]


class Remaining(TypedDict):
    """One thing that was left as it is."""

    code: Annotated[str, "of the finding"]
    where: Annotated[str, "the state dict or the tensor"]
    message: Annotated[str, "what was found"]
    reason: Annotated[str, "why it was left"]


class Fix(Written):
    """What `fix` answers."""

    plan: Annotated[list[Cure], "what was repaired; empty where nothing had to be"]
    remaining: Annotated[list[Remaining], "what is still wrong, or may be"]
    renamed: Annotated[list[Renamed], "state dicts of which keys were renamed"]
    dropped: Annotated[list[str], "keys that the model does not have, or that `--drop` names"]
    of_another_dtype: Annotated[list[str], "keys that torch casts when it loads them"]
    values_change: Annotated[list[str], "keys whose values change as torch loads them"]
    may_be_transposed: Annotated[list[str], "square weights, which do not tell"]
    copied: Annotated[int | None, "tensors that were written"]


class Recover(Written):
    """What `recover` answers."""

    saved: Annotated[int | None, "tensors that were saved"]
    unchecked: Annotated[int | None, "those of them that have no checksum"]
    lost: Annotated[list[str], "tensors whose bytes are not whole"]
    missing: Annotated[list[str], "keys that the model has, and the output has not"]
    steps: Annotated[list[str], "what was done to read it"]


# --- diff


class Added(TypedDict):
    """A key that only one side has."""

    key: Annotated[str, "its name"]
    shape: Annotated[list[int] | None, "null: no tensor"]
    dtype: Annotated[str | None, "null: no tensor"]
    kind: Annotated[str, "empty for a dense tensor"]


class Pair(TypedDict):
    """A key that is in both, of another shape or dtype."""

    key: Annotated[str, "its name"]
    input: Annotated[Spec, "what A has"]
    other: Annotated[Spec, "what B has"]


class Values(TypedDict):
    """A tensor whose values differ."""

    key: Annotated[str, "its name in A"]
    other: Annotated[str, "its name in B"]
    elements: Annotated[int, "how many it has"]
    differing: Annotated[int | None, "how many differ; null where only bytes could be compared"]
    max_abs: Annotated[float | None, "the largest difference; null without bound"]
    max_rel: Annotated[float | None, "the same, relative to the larger value"]


class StatesDiffer(TypedDict):
    """How two state dicts differ."""

    input: Annotated[str, "path of that of A"]
    other: Annotated[str, "path of that of B"]
    equal: Annotated[int, "tensors that are the same"]
    removed: Annotated[list[Added], "keys that only A has"]
    added: Annotated[list[Added], "keys that only B has"]
    renamed: Annotated[dict[str, str], "keys of A that have another name in B"]
    shapes: Annotated[list[Pair], "keys of another shape"]
    dtypes: Annotated[list[Pair], "keys of another dtype"]
    values: Annotated[list[Values], "tensors of other values"]


class OtherDiffers(TypedDict):
    """What is not a tensor of a state dict."""

    path: Annotated[str, "where it stands"]
    input: Annotated[str | None, "what A has, as text; null: nothing"]
    other: Annotated[str | None, "what B has, as text; null: nothing"]


class Diff(TypedDict):
    """`input` is A, and `output` the page of `--html`."""

    other: Annotated[str | None, "B, as it was given"]
    same: Annotated[bool | None, "whether nothing differs"]
    keys_only: Annotated[bool, "values were not compared, as was asked"]
    state_dicts: Annotated[list[StatesDiffer], "in pairs"]
    others: Annotated[list[OtherDiffers], "everything else that differs"]


# --- explain


class Explained(TypedDict):
    """A known error that the text tells of."""

    code: Annotated[str, "of the [error](errors.md)"]
    severity: Annotated[Literal["error", "warning", "note"], "how much it matters"]
    excerpt: Annotated[str, "the line that tells of it"]
    message: Annotated[str, "what it means"]
    command: Annotated[str | None, "what repairs it, as a line of shell, where a command does"]
    advice: Annotated[str | None, "what to do, where no command does it"]


class Explain(TypedDict):
    """`input` is the file with the text; null where the text was given, or piped."""

    found: Annotated[list[Explained], "the last one told first"]


VERBS: Mapping[str, type] = {
    "inspect": Inspect,
    "check": Check,
    "fix": Fix,
    "recover": Recover,
    "explain": Explain,
    "strip-prefix": Renames,
    "add-prefix": Renames,
    "rename": Renames,
    "to-cpu": ToCpu,
    "convert": Convert,
    "diff": Diff,
}
"""The fields of each verb, beside those of `Answer`."""

_OF_ARGUMENTS = {
    "source": "input", "a": "input", "b": "other", "dry_run": "dry_run",
    "in_place": "in_place", "keys_only": "keys_only",
}  # fmt: skip
"""Arguments and options of verbs, and the fields that tell of them."""


def blank(verb: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a verb that could not do its work: what was given, and nothing else."""
    fields = _fields(Answer) | _fields(VERBS.get(verb or ""))
    answer = {name: _nothing(annotation) for name, annotation in fields.items()}
    known = {name: given[key] for key, name in _OF_ARGUMENTS.items() if given.get(key)}
    return answer | {name: value for name, value in known.items() if name in fields}


def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True) if is_typeddict(kind) else {}


def _nothing(annotation: Any) -> Any:
    kind = get_args(annotation)[0]
    kind = get_origin(kind) or kind
    return kind() if kind in (list, dict, bool) else None


# --- the documentation


def as_markdown() -> str:
    """The types as `docs/json.md` has them: what all answers have, each verb, what is in them."""
    parts = ["## Every answer", *_table(Answer)]
    inner: dict[str, type] = {}
    _collect(Answer, inner)
    told: dict[type, list[str]] = {}
    for verb, kind in VERBS.items():
        told.setdefault(kind, []).append(f"`{verb}`")
        _collect(kind, inner)
    parts += ["", "## The verbs that write", "", str(Written.__doc__), *_table(Written)]
    for kind, verbs in told.items():
        writes = _fields(Written).keys() <= _fields(kind).keys()
        own = [name for name in _fields(kind) if not (writes and name in _fields(Written))]
        about = "With the fields of every verb that writes." if writes else str(kind.__doc__)
        parts += ["", f"## {', '.join(verbs)}", "", about, *_table(kind, own)]
    for name, kind in inner.items():
        parts += ["", f"### {name}", "", str(kind.__doc__), *_table(kind)]
    return "\n".join(parts)


def _table(kind: type, names: Collection[str] | None = None) -> list[str]:
    rows = ["", "| field | type | meaning |", "|---|---|---|"]
    for name, annotation in _fields(kind).items():
        if names is None or name in names:
            said, meaning = get_args(annotation)
            rows.append(f"| `{name}` | {_said(said)} | {meaning} |")
    return rows


def _said(annotation: Any) -> str:
    """A type in JSON's words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _said(args[0])
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin is list:
        return f"list of {_said(args[0])}"
    if origin is dict:
        return f"object of {_said(args[1])}"
    if args:
        return " or ".join(map(_said, args))
    if is_typeddict(annotation):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _WORDS[annotation]


_WORDS: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null",
}  # fmt: skip


def _collect(kind: type, into: dict[str, type]) -> None:
    """The types that are inside a type, each once, in the order in which they are met."""
    for annotation in _fields(kind).values():
        for inner in _types_in(annotation):
            if inner.__name__ not in into:
                into[inner.__name__] = inner
                _collect(inner, into)


def _types_in(annotation: Any) -> list[type]:
    """The typed dictionaries in an annotation."""
    if is_typeddict(annotation):
        return [annotation]
    return [kind for arg in get_args(annotation) for kind in _types_in(arg)]
