"""How much a file may ask for before it is refused.

Checkpoints come from strangers, and a few bytes can ask for terabytes. These caps sit far above any
checkpoint seen in practice; whoever needs more passes another `Limits` to `ckptfix.open`.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Caps on what one file may ask for."""

    pickle_bytes: int = 4 << 30
    """Bytes of one pickle that lies in memory while it is read (weights are never part of it)."""

    opcodes: int = 1 << 62
    """Opcodes of one pickle. Each may cost hundreds of bytes of memory; what a file that is packed
    may ask for depends on its size."""

    header_bytes: int = 100_000_000
    """Bytes of a safetensors header: the cap that the safetensors library itself sets."""

    long_bytes: int = 1 << 16
    """Bytes of one pickled integer; decoding it costs time that grows with the square."""

    text_digits: int = 4096
    """Digits of one integer that is pickled as text."""

    name_characters: int = 1000
    """Characters of a class name; each dot in it is a call in the pickle that is written."""

    key_nodes: int = 1000
    """Values inside one tuple that serves as a dict key (hashing visits each of them)."""

    tensor_bytes: int = 1 << 40
    """Bytes that one tensor may claim through strides of zero."""

    repeated_bytes: int = 4 << 30
    """Bytes that tensors may grow by in all, where they repeat elements through their strides, and
    are written to a container that has no strides."""

    records: int = 10_000_000
    """Records of one zip archive."""

    def of_packed(self, size: int) -> Limits:
        """What a file of `size` bytes may ask for once it is unpacked: some, or so many times that.

        A few bytes could ask for any amount; a file that stays small may grow as it likes.
        """
        return self._replace(
            pickle_bytes=min(self.pickle_bytes, unpacked_bytes(size)),
            opcodes=min(self.opcodes, max(_FREE_OPCODES, _OPCODES * size)),
        )


def unpacked_bytes(size: int) -> int:
    """How many bytes a packed file of `size` bytes may unpack to."""
    return max(_FREE_BYTES, _RATIO * size)


_FREE_BYTES, _RATIO = 256 << 20, 200
_FREE_OPCODES, _OPCODES = 50_000, 100

DEFAULT = Limits()
