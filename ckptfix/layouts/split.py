"""Parts of one file that was split, as `split` and uploads do it: told by their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ckptfix.errors import DamagedError
from ckptfix.hints import Hint, shell
from ckptfix.words import plural

if TYPE_CHECKING:
    from ckptfix.bytes.place import Place

_PART = re.compile(r"(.+?\.\w+?)[._-](?:part[._-]?)?(?:\d{1,4}|[a-z]{2})")


_JOIN = 'set -C; cat "$@" > "$0"'
"""What joins files into the first that is named, unless it is there."""


def is_part(place: Place) -> bool:
    """Whether a file is one of several that are called alike but for a number at the end."""
    return len(_parts(place)) > 1


def _parts(place: Place) -> list[str]:
    match = _PART.fullmatch(place.base)
    if match is None or not place.is_file:
        return []
    others = ((name, _PART.fullmatch(name)) for name in place.folder.names())
    parts = [name for name, other in others if other is not None and other[1] == match[1]]
    return sorted(parts, key=lambda name: (len(name), name))


def error(place: Place) -> DamagedError:
    """The error for one part: that it is one, and how to join them."""
    parts, match = _parts(place), _PART.fullmatch(place.base)
    names = [place.base if match is None else match[1], *parts]
    within = place.name[: len(place.name) - len(place.base)]
    join = shell("sh", "-c", _JOIN, files=[within + name for name in names])
    return DamagedError(
        f"is one of {plural(len(parts), 'part')} of a file that was split",
        where=place,
        hint=Hint("join them", join),
        code="split",
    )
