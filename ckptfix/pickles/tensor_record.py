"""The opcodes of a tensor, as `torch.save` writes them, in one step.

A checkpoint holds thousands of tensors, and each takes the same thirty opcodes or so. Exactly these
are matched here, and do what they do one by one; where anything differs, they are left to
`opcodes`. In the words of `pickletools`, with a LONG_BINPUT behind each object but empty tuples, or
with none:

    MARK MARK GET "storage", GET class, BINUNICODE key, GET device, BININT numel, [NONE,] TUPLE,
    BINPERSID, BININT offset, shape, stride, NEWFALSE or NEWTRUE, GET OrderedDict, EMPTY_TUPLE,
    REDUCE, TUPLE, REDUCE
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.document import Global, Node, Storage, Tensor
from ckptfix.dtypes import UNTYPED
from ckptfix.pickles.torch_objects import check_layout, ordered_dict, tensor_v2

if TYPE_CHECKING:
    from ckptfix.pickles.machine import Machine

_GET, _INTEGER = rb"(?:h.|j....)", rb"(?:K.|M..|J....)"
_SIZES = rb"(?:\)|%b(?:\x85|%b(?:\x86|%b\x87))|\((?:%b){4,8}t)" % ((_INTEGER,) * 4)
_DEVICE, _OFFSET = rb"%b%bN?t" % (_GET, _INTEGER), rb"Q" + _INTEGER
_REST = rb"[\x88\x89]%b\)R" % _GET
_TENSOR = re.compile(
    rb"\(\((%b%b)X(.)\0\0\0([0-9]{1,20})(?:" % (_GET, _GET)
    + rb"(%b%b%b%b%b)tR" % (_DEVICE, _OFFSET, _SIZES, _SIZES, _REST)
    + rb"|r(....)(%b)r(....)(?:(%b\)\))|(%b%b)r(....)(%b)r(....))(%b)r(....)tr(....)Rr(....))"
    % (_DEVICE, _OFFSET, _OFFSET, _SIZES, _SIZES, _REST),
    re.DOTALL,
)
"""Groups: 1 names, 2 and 3 the key; 4 what follows it, where nothing is memoized. Otherwise that is
in 6, 8 (empty tuples) or 9 and 11, and 13, and the numbers of the PUTs are in the others."""
_LAYOUT = re.compile(
    rb"(%b)(%b)(N?)tQ(%b)(%b)(%b)([\x88\x89])(%b)\)R"
    % (_GET, _INTEGER, _INTEGER, _SIZES, _SIZES, _GET),
    re.DOTALL,
)
"""What follows the key, with a group for each part."""
_OPERANDS = re.compile(rb"[hK].|M..|[jJ]....", re.DOTALL)
_PUTS, _FEWER_PUTS = struct.Struct("<7I"), struct.Struct("<5I")


def run(m: Machine, at: int) -> int | None:
    """Run them from the first MARK on, what is called being on the stack already.

    Returns the position of the next opcode, or None, and changes nothing, where they differ.
    """
    match = _TENSOR.match(m.data, at)
    if match is None or not m.stack or m.framed:
        return None
    names, length, digits, layout = match.group(1, 2, 3, 4)
    if length[0] != len(digits):
        return None
    key = digits.decode()
    if layout is None:
        _run_memoized(m, names, key, match)
    else:
        usual, memo = _decoded(names, layout), m.memo
        pid = (memo[usual.word], memo[usual.cls], key, memo[usual.device], usual.numel)
        storage = m.persistent((*pid, None) if usual.sixth else pid)
        m.stack[-1] = _made(m, storage, usual, memo[usual.hooks])
    return match.end()


def _run_memoized(m: Machine, names: bytes, key: str, match: re.Match[bytes]) -> None:
    """Run them where each object is put into the memo as well."""
    device, scalar, shape, stride, rest = match.group(6, 8, 9, 11, 13)
    if scalar is None:
        usual = _decoded(names, device + shape + stride + rest)
        a, b, c, d, e, f, g = _PUTS.unpack(b"".join(match.group(5, 7, 10, 12, 14, 15, 16)))
    else:
        usual = _decoded(names, device + scalar + rest)
        a, b, e, f, g = _FEWER_PUTS.unpack(b"".join(match.group(5, 7, 14, 15, 16)))
    memo = m.memo
    word, cls = memo[usual.word], memo[usual.cls]
    memo[a] = key
    described = (word, cls, key, memo[usual.device], usual.numel)
    memo[b] = pid = (*described, None) if usual.sixth else described
    storage = m.persistent(pid)
    if scalar is None:
        memo[c], memo[d] = usual.shape, usual.stride
    function = memo[usual.hooks]
    memo[e] = hooks = m.call(function, ())
    args = (storage, usual.offset, usual.shape, usual.stride, usual.requires_grad, hooks)
    memo[f] = args
    memo[g] = m.stack[-1] = _made(m, storage, usual, function, args)


def _made(
    m: Machine, storage: Node, usual: _Usual, hooks: Node, args: tuple[Node, ...] | None = None
) -> Node:
    """What the call makes; without a detour where it is torch's, whose arguments are right."""
    function, known = m.stack[-1], m.builders
    if (
        (type(function) is type(hooks) is Global)
        and known.get(function) is tensor_v2
        and known.get(hooks) is ordered_dict
        and type(storage) is Storage
        and storage.dtype is not UNTYPED
        and len(usual.shape) == len(usual.stride)
    ):
        offset, shape, stride = usual.offset, usual.shape, usual.stride
        check_layout(storage, storage.dtype, offset, shape, stride, m.limits)
        return Tensor(storage, storage.dtype, shape, stride, offset, usual.requires_grad)
    if args is None:
        layout = (usual.offset, usual.shape, usual.stride)
        args = (storage, *layout, usual.requires_grad, m.call(hooks, ()))
    return m.call(function, args)


class _Usual(NamedTuple):
    """What most tensors have in common with others; the first three and `hooks` are memo places."""

    word: int
    cls: int
    device: int
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: int
    sixth: bool
    """Whether the persistent id has a sixth part, None."""


@lru_cache(4096)
def _decoded(names: bytes, layout: bytes) -> _Usual:
    """The operands of the opcodes before the key of a storage, and of those behind it."""
    ((device, numel, none, offset, shape, stride, grad, hooks),) = _LAYOUT.findall(layout)
    shape, stride = tuple(_numbers(shape)), tuple(_numbers(stride))
    word, cls, tag, count, start, made = _numbers(names + device + numel + offset + hooks)
    return _Usual(word, cls, tag, count, start, shape, stride, grad == b"\x88", made, bool(none))


def _numbers(opcodes: bytes) -> list[int]:
    """The operands of some opcodes; only that of BININT has a sign."""
    found = _OPERANDS.findall(opcodes)
    return [int.from_bytes(each[1:], "little", signed=each[:1] == b"J") for each in found]
