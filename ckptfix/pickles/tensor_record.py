"""The opcodes of a tensor, as `torch.save` writes them, in one step.

A checkpoint holds thousands of tensors, and each takes the same thirty opcodes or so. Exactly these
are matched here, and do what they do one by one; where anything differs, they are left to
`opcodes`. In the words of `pickletools`, with a LONG_BINPUT behind each object, or with none:

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

_GET, _PUT, _INTEGER = rb"(?:h.|j....)", rb"(?:r(....))?", rb"(?:K.|M..|J....)"
_SIZES = rb"(?:\)|%b\x85|%b%b\x86|%b%b%b\x87|\((?:%b){4,8}t)" % ((_INTEGER,) * 7)
_TENSOR = re.compile(
    rb"\(\((%(get)b%(get)b)X(.)\0\0\0([0-9]{1,20})%(put)b"
    rb"(%(get)b%(integer)b)(N?)t%(put)bQ"
    rb"(%(integer)b%(sizes)b)%(put)b(%(sizes)b)%(put)b"
    rb"([\x88\x89]%(get)b)\)R%(put)bt%(put)bR%(put)b"
    % {b"get": _GET, b"put": _PUT, b"integer": _INTEGER, b"sizes": _SIZES},
    re.DOTALL,
)
_OPERANDS = re.compile(rb"[hK].|M..|[jJ]....", re.DOTALL)
_PUTS = struct.Struct("<7I")


def run(m: Machine, at: int) -> int | None:
    """Run them from the first MARK on, what is called being on the stack already.

    Returns the position of the next opcode, or None, and changes nothing, where they differ.
    """
    match = _TENSOR.match(m.data, at)
    if match is None or not m.stack or m.framed:
        return None
    names, length, digits, a, numel, none, b, shape, c, stride, d, end, e, f, g = match.groups()
    puts = (a, b, c, d, e, f, g)
    absent = puts.count(None)
    if length[0] != len(digits) or absent not in (0, len(puts)):
        return None
    usual, key = _decoded(names, numel, shape, stride, end), digits.decode()
    if absent:
        memo = m.memo
        pid = (memo[usual.word], memo[usual.cls], key, memo[usual.device], usual.numel)
        storage = m.persistent((*pid, None) if none else pid)
        m.stack[-1] = _made(m, storage, usual, memo[usual.hooks])
    else:
        _run_kept(m, usual, key, bool(none), _PUTS.unpack(b"".join(puts)))
    return match.end()


def _run_kept(m: Machine, usual: _Usual, key: str, none: bool, puts: tuple[int, ...]) -> None:
    """Run them where each object is put into the memo as well."""
    memo, (put_key, put_pid, put_shape, put_stride, put_hooks, put_args, put) = m.memo, puts
    word, cls = memo[usual.word], memo[usual.cls]
    memo[put_key] = key
    described = (word, cls, key, memo[usual.device], usual.numel)
    memo[put_pid] = pid = (*described, None) if none else described
    storage = m.persistent(pid)
    memo[put_shape], memo[put_stride] = usual.shape, usual.stride
    function = memo[usual.hooks]
    memo[put_hooks] = hooks = m.call(function, ())
    args = (storage, usual.offset, usual.shape, usual.stride, usual.requires_grad, hooks)
    memo[put_args] = args
    memo[put] = m.stack[-1] = _made(m, storage, usual, function, args)


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


@lru_cache(4096)
def _decoded(names: bytes, numel: bytes, shape: bytes, stride: bytes, end: bytes) -> _Usual:
    word, cls, device, count, hooks = _numbers(names + numel + end[1:])
    offset, *sizes = _numbers(shape)
    requires_grad, steps = end[:1] == b"\x88", tuple(_numbers(stride))
    return _Usual(word, cls, device, count, offset, tuple(sizes), steps, requires_grad, hooks)


def _numbers(opcodes: bytes) -> list[int]:
    """The operands of some opcodes; only that of BININT has a sign."""
    found = _OPERANDS.findall(opcodes)
    return [int.from_bytes(each[1:], "little", signed=each[:1] == b"J") for each in found]
