"""How a file is read: strictly, or for what is whole of it. Every format asks the same object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.limits import DEFAULT, Limits

if TYPE_CHECKING:
    from ckptfix.errors import ReadError
    from ckptfix.tree.document import Storage


class Reading:
    """One reading of a file, or of several that are one checkpoint: nothing may be missing."""

    salvages = False
    """Whether what is missing is noted, and the rest read."""

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.limits = limits

    def narrow(self, size: int) -> None:
        """Lower what may be asked for from here on, as inside of a packed file of `size` bytes."""
        self.limits = self.limits.of_packed(size)

    def lose(self, storage: Storage, error: ReadError) -> None:
        """Say that the bytes of a storage are not there; raises `error`, which says why."""
        raise error

    def skip(self, step: str, error: ReadError) -> None:
        """Say that a file, or a part of one, cannot be read; raises `error`, which says why."""
        raise error

    def has_lost(self, storage: Storage) -> bool:
        """Whether the bytes of a storage were said not to be there."""
        return False

    def lack(self, path: str, error: ReadError) -> None:
        """Say that what should stand at a path cannot be had; raises `error`, which says why."""
        raise error


class Salvage(Reading):
    """A reading of what is whole in a damaged file: what is missing is noted here."""

    salvages = True

    def __init__(self, limits: Limits = DEFAULT, archive: int | None = None) -> None:
        super().__init__(limits)
        self.archive = archive
        """Which of several saves in one file is wanted, counted from 1; None: there is but one."""
        self.told_apart = False
        """Whether a format has looked for several."""
        self.lost: list[Storage] = []
        """Storages whose bytes are not there, or are wrong."""
        self._lost: set[int] = set()
        self.absent: list[str] = []
        """Keys that the checkpoint should have and that no file has."""
        self.steps: list[str] = []
        """What had to be done to read the file, in order."""

    def lose(self, storage: Storage, error: ReadError) -> None:
        """Note that the bytes of a storage are not there."""
        self.lost.append(storage)
        self._lost.add(id(storage))

    def skip(self, step: str, error: ReadError) -> None:
        """Note that a file, or a part of one, cannot be read."""
        self.steps.append(f"{step} ({error})")

    def has_lost(self, storage: Storage) -> bool:
        """Whether the bytes of a storage were said not to be there."""
        return id(storage) in self._lost

    def lack(self, path: str, error: ReadError) -> None:
        """Note that what should stand at a path cannot be had."""
        self.absent.append(path)
        self.steps.append(str(error))
