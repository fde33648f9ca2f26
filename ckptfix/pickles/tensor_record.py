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

from ckptfix.pickles.torch_objects import check_layout, ordered_dict, tensor_v2
from ckptfix.tree.document import Global, Node, Storage, Tensor
from ckptfix.tree.dtypes import UNTYPED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.pickles.machine import Machine

_GET, _INTEGER = rb"(?:h.|j....)", rb"(?:K.|M..|J....)"
_SIZES = rb"(?:\)|%b(?:\x85|%b(?:\x86|%b\x87))|\((?:%b){4,8}t)" % ((_INTEGER,) * 4)
_TENSOR = re.compile(
    rb"\(\((%(get)b%(get)b)X(.)\0\0\0([0-9]{1,20})%(put)b"
    rb"(%(get)b%(integer)bN?t)%(put)b(Q%(integer)b%(sizes)b)%(put)b(%(sizes)b)%(put)b"
    rb"([\x88\x89]%(get)b\)R)%(put)bt%(put)bR%(put)b"
    % {b"get": _GET, b"integer": _INTEGER, b"sizes": _SIZES, b"put": rb"(?:r(....)|)"},
    re.DOTALL,
)
_OPCODES = re.compile(rb"[hK].|M..|[jJ]....|.", re.DOTALL)
_FIVE, _SEVEN = struct.Struct("<5I"), struct.Struct("<7I")


def run(m: Machine, at: int) -> int | None:
    """Run them from the first MARK on, what is called being on the stack already.

    Returns the position of the next opcode, or None, and changes nothing, where they differ.
    """
    match = _TENSOR.match(m.data, at)
    if match is None or not m.stack or m.framed:
        return None
    names, length, digits, key_put, device, pid_put, *sizes, rest, hooks_put, args_put, put = (
        match.groups()
    )
    shape, shape_put, stride, stride_put = sizes
    if length[0] != len(digits):
        return None
    key, usual = digits.decode(), _decoded(names, device + shape + stride + rest)
    puts, size_puts = (key_put, pid_put, hooks_put, args_put, put), (shape_put, stride_put)
    absent = (puts + size_puts).count(None)
    if absent == 7:
        memo = m.memo
        pid = (memo[usual.word], memo[usual.cls], key, memo[usual.device], usual.numel)
        storage = m.persistent((*pid, None) if usual.sixth else pid)
        m.stack[-1] = _made(m, storage, usual, memo[usual.hooks])
    elif absent == 0:
        _run_memoized(m, usual, key, _SEVEN.unpack(b"".join(puts + size_puts)))
    elif absent == 2 and shape_put is stride_put is None:  # empty tuples are not memoized
        _run_memoized(m, usual, key, _FIVE.unpack(b"".join(puts)))
    else:
        return None
    return match.end()


def _run_memoized(m: Machine, usual: _Usual, key: str, puts: tuple[int, ...]) -> None:
    """Run them where objects are memoized; the numbers of shape and stride come last, if at all."""
    memo, (put_key, put_pid, put_hooks, put_args, put, *put_tuples) = m.memo, puts
    word, cls = memo[usual.word], memo[usual.cls]
    memo[put_key] = key
    described = (word, cls, key, memo[usual.device], usual.numel)
    memo[put_pid] = pid = (*described, None) if usual.sixth else described
    storage = m.persistent(pid)
    if put_tuples:
        memo[put_tuples[0]], memo[put_tuples[1]] = usual.shape, usual.stride
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
    sixth: bool
    """Whether the persistent id has a sixth part, None."""


@lru_cache(4096)
def _decoded(names: bytes, layout: bytes) -> _Usual:
    """The operands of the opcodes before the key of a storage, and of those behind it."""
    word, cls = map(_number, _OPCODES.findall(names))
    device, numel, *opcodes = _OPCODES.findall(layout)
    sixth = opcodes[0] == b"N"
    remaining = iter(opcodes[2 + sixth :])  # after TUPLE and BINPERSID
    offset, shape, stride = _number(next(remaining)), _sizes(remaining), _sizes(remaining)
    grad, hooks, *_ = remaining
    described = (word, cls, _number(device), _number(numel), offset, shape, stride)
    return _Usual(*described, grad == b"\x88", _number(hooks), sixth)


def _sizes(opcodes: Iterator[bytes]) -> tuple[int, ...]:
    """The integers before the opcode that makes a tuple of them, which is taken as well."""
    sizes: list[int] = []
    for opcode in opcodes:
        if len(opcode) > 1:
            sizes.append(_number(opcode))
        elif opcode != b"(":
            break
    return tuple(sizes)


def _number(opcode: bytes) -> int:
    """The operand of an opcode; only that of BININT has a sign."""
    return int.from_bytes(opcode[1:], "little", signed=opcode[:1] == b"J")
