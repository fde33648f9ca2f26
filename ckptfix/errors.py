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
    │   └── VerifyError            what was read back is not what was meant
    ├── SelectionError             the state dict asked for is not there, or more than one is
    ├── RenameError                keys cannot be renamed as asked
    │   ├── KeyCollisionError      two keys would become one
    │   └── PartialPrefixError     only some of the keys carry the prefix
    ├── TargetError                the model or key list to check against cannot be had
    └── KeyMismatchError           the keys do not match the target; carries the report

Each has a `message` (what and where, in one line), `details` (more lines, if any), a `hint` (one
line, with a command where there is one) and a `code` (a slug that scripts can test). Anything else
that escapes is a bug in ckptfix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptfix.report import Report


class CkptfixError(Exception):
    """The base of every error that ckptfix raises on purpose."""

    code: ClassVar[str] = "error"
    cure: ClassVar[str | None] = None
    """The hint where none is given."""
    details: Sequence[str] = ()
    """Lines that say more than the message, which is one line."""

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.cure
        self.slug = code or self.code


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


class InPlaceError(WriteError):
    """The edit cannot be made inside the file, only in a copy."""

    code = "in-place"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"{name}: cannot be changed in place: {why}", hint="write a copy of it instead"
        )


class VerifyError(WriteError):
    """What was written does not read back as what was meant."""

    code = "verify-failed"


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
        super().__init__(
            f"{first!r} and {second!r} would both become {new!r}",
            hint="rename one of them first: ckptfix rename IN OUT --sub PATTERN REPLACEMENT",
        )
        self.first, self.second, self.new = first, second, new


class PartialPrefixError(RenameError):
    """Only some of the keys carry the prefix."""

    code = "partial-prefix"

    def __init__(self, prefix: str, carrying: Sequence[str], lacking: Sequence[str]) -> None:
        super().__init__(
            f"{len(carrying)} of {len(carrying) + len(lacking)} keys begin with {prefix!r}; "
            f"{lacking[0]!r} does not",
            hint="strip it from the keys that have it: add --partial",
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
        message: str,
        *,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.report = report
        self.details = details

    def __str__(self) -> str:
        return "\n".join([self.message, *self.details])
