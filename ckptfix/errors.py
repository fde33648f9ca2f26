"""Everything ckptfix raises on purpose.

    CkptfixError
    ├── ReadError                  the input cannot be read
    │   ├── NotACheckpointError    it is something else: a page, a pointer, nothing at all
    │   ├── DamagedError           it is a checkpoint, but not a whole one
    │   ├── UnsafeError            readers would disagree about it, or it asks for too much
    │   └── UnsupportedError       a form that ckptfix does not read, or the output cannot hold
    ├── WriteError                 the output cannot be written
    │   ├── OutputExistsError
    │   ├── InPlaceError           the edit needs a copy of the file
    │   ├── BusyError              another process is changing the file
    │   └── VerifyError            what was read back is not what was meant
    ├── SelectionError             the state dict asked for is not there, or more than one is
    ├── RenameError                keys cannot be renamed as asked
    │   ├── KeyCollisionError      two keys would become one
    │   └── PartialPrefixError     only some of the keys carry the prefix
    ├── ArgumentError              a function was given something else than it takes
    ├── TargetError                the model or key list to check against cannot be had
    └── KeyMismatchError           the keys do not match the target; carries the report
        └── ChangedMeaningError    keys that change what others mean would be dropped

An error is data: `where` (a file, a state dict in it, a byte), `what` (one line), `details` (more
lines, if any), a `hint` and a `code` (a slug that scripts can test). `str()` puts where, what and
the details together; in a traceback the hint follows, in Python. All of them can be pickled and
copied. Anything else that escapes is a bug in ckptfix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ckptfix.hints import Hint, adding, command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptfix.report import Report


class CkptfixError(Exception):
    """The base of every error that ckptfix raises on purpose."""

    code: str = "error"
    """A slug for scripts; an error may have another one than its class."""
    cure: ClassVar[str | None] = None
    """The hint where none is given."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        hint: Hint | str | None = None,
        code: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.details = tuple(details)
        self.code = code or self.code
        self.hint: Hint | None = None
        self.suggest(self.cure if hint is None else hint)

    @property
    def message(self) -> str:
        """Where and what, in one line."""
        return self.what if self.where is None else f"{self.where}: {self.what}"

    def __str__(self) -> str:
        return "\n".join([self.message, *self.details])

    def within(self, place: object) -> Self:
        """The same error, which happened inside of `place`."""
        self.where = str(place) if self.where is None else f"{place}: {self.where}"
        return self

    def suggest(self, hint: Hint | str | None) -> Self:
        """The same error with another hint, also in the traceback."""
        notes = [note for note in getattr(self, "__notes__", ()) if note != _note(self.hint)]
        self.hint = Hint(hint) if isinstance(hint, str) else hint
        if self.hint is not None:
            notes.append(_note(self.hint))
        self.__notes__ = notes
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__.copy())


def _note(hint: Hint | None) -> str:
    return "" if hint is None else f"hint: {hint.in_python()}"


def _restored(cls: type[CkptfixError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """A pickled or copied error: what it holds is set, whatever its constructor takes."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class ReadError(CkptfixError):
    """The input cannot be read."""

    code = "unreadable"


class NotACheckpointError(ReadError):
    """The input is something other than a checkpoint."""

    code = "not-a-checkpoint"


class DamagedError(ReadError):
    """The input is a checkpoint of which a part is missing or wrong."""

    code = "damaged"
    cure = "copy or download it again"


class UnsafeError(ReadError):
    """The input is ambiguous, or asks for more than a sound file would."""

    code = "unsafe"
    cure = "get it again, from someone you trust"


class UnsupportedError(ReadError):
    """A form that ckptfix does not read, or that the output cannot hold."""

    code = "unsupported"


class WriteError(CkptfixError):
    """The output cannot be written; nothing was left behind."""

    code = "unwritable"


class OutputExistsError(WriteError):
    """The output is there already, and replacing it was not asked for."""

    code = "output-exists"

    def __init__(self, what: str = "is there already", *, where: object = None) -> None:
        super().__init__(what, where=where, hint=adding("replace it", "force"))


class InPlaceError(WriteError):
    """The edit cannot be made inside the file, only in a copy."""

    code = "in-place"
    cure = "write a copy of it instead"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"cannot be changed in place: {why}", where=name)


class BusyError(WriteError):
    """Another process is changing the file."""

    code = "busy"
    cure = "try again when it is done"

    def __init__(self, name: object) -> None:
        super().__init__("is being changed by another process", where=name)


class VerifyError(WriteError):
    """What was written does not read back as what was meant."""

    code = "verify-failed"


class ArgumentError(CkptfixError, TypeError):
    """A function was given something else than it takes."""

    code = "argument"


class SelectionError(CkptfixError):
    """The state dict asked for is not there, or several could be meant."""

    code = "selection"


class RenameError(CkptfixError):
    """The keys cannot be renamed as asked."""

    code = "rename"


class KeyCollisionError(RenameError):
    """Two keys would become one, and one of the tensors would be lost."""

    code = "key-collision"

    def __init__(self, first: str, second: str, new: str) -> None:
        rename = command("rename", "IN", "OUT", sub=("PATTERN", "REPLACEMENT"))
        super().__init__(
            f"{first!r} and {second!r} would both become {new!r}",
            hint=Hint("rename one of them first", rename),
        )
        self.first, self.second, self.new = first, second, new


class PartialPrefixError(RenameError):
    """Only some of the keys carry the prefix."""

    code = "partial-prefix"

    def __init__(self, prefix: str, carrying: Sequence[str], lacking: Sequence[str]) -> None:
        super().__init__(
            f"{len(carrying)} of {len(carrying) + len(lacking)} keys begin with {prefix!r}; "
            f"{lacking[0]!r} does not",
            hint=adding("strip it from the keys that have it", "partial"),
        )
        self.prefix, self.carrying, self.lacking = prefix, list(carrying), list(lacking)


class TargetError(CkptfixError):
    """The model, file or key list to check against cannot be had."""

    code = "target"


class KeyMismatchError(CkptfixError):
    """The keys, shapes or dtypes do not match the target; `report` says how."""

    code = "key-mismatch"

    def __init__(
        self,
        report: Report,
        what: str,
        *,
        where: object = None,
        hint: Hint | str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(what, where=where, hint=hint, details=details)
        self.report = report


class ChangedMeaningError(KeyMismatchError):
    """Keys that the target does not have change what those mean that it has.

    `options` are those of `fix` that would do what can be done, by name.
    """

    code = "changed-meaning"

    def __init__(
        self,
        report: Report,
        what: str,
        *,
        where: object = None,
        hint: Hint | str | None = None,
        details: Sequence[str] = (),
        options: Mapping[str, tuple[str, ...] | str | bool] | None = None,
    ) -> None:
        super().__init__(report, what, where=where, hint=hint, details=details)
        self.options = dict(options or {})
