"""The opcodes of pickles, protocols 0 to 5, and the string opcodes of Python 2.

Each takes the machine and the position after its code, and returns the position of the next opcode.
What they do is told in `pickletools`; what differs here is that nothing is looked up and nothing is
called.
"""

from __future__ import annotations

import codecs
import struct
from typing import TYPE_CHECKING, NoReturn

from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError
from ckptfix.pickles import tensor_record
from ckptfix.pickles.machine import Machine, Stop
from ckptfix.tree.document import Global, Inert, Node, OrderedMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfix.pickles.machine import Data

    Operation = Callable[[Machine, int], int]

RETRY = "the file is damaged: copy or download it again"

_U1, _U2, _U4, _U8 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_read_u4 = _U4.unpack_from


def _number(layout: struct.Struct, data: Data, at: int) -> int:
    found: int = layout.unpack_from(data, at)[0]
    return found


# --- the stack and the memo


def _mark(m: Machine, at: int) -> int:
    if m.data[at] == _MARK and (end := tensor_record.run(m, at - 1)) is not None:
        return end
    m.marks.append(m.stack)
    m.stack = []
    return at


def _stop(m: Machine, at: int) -> NoReturn:
    """Unpicklers take the topmost value, and do not look at what is left below it."""
    root = m.stack.pop()
    raise Stop(root, at, [*(node for row in m.marks for node in row), *m.stack])


def _pop(m: Machine, at: int) -> int:
    if m.stack:
        del m.stack[-1]
    else:
        m.pop_mark()
    return at


def _pop_mark(m: Machine, at: int) -> int:
    m.pop_mark()
    return at


def _dup(m: Machine, at: int) -> int:
    m.stack.append(m.stack[-1])
    return at


def _proto(m: Machine, at: int) -> int:
    if m.data[at] > 5:
        raise UnsupportedError(f"pickle protocol {m.data[at]} is not known")
    return at + 1


def _frame(m: Machine, at: int) -> int:
    """Run the opcodes of one frame; they must end where it ends, and none may open another."""
    if m.framed:
        raise UnsafeError("a frame opens inside a frame")
    position = at + 8
    end = position + _number(_U8, m.data, at)
    if end > len(m.data):
        raise DamagedError(f"a frame of {end - position} bytes is announced")
    m.framed = True
    for _ in m.allowance:
        if position >= end:
            break
        position = OPERATIONS[m.data[position]](m, position + 1)
    else:
        raise m.too_long()
    if position > end:
        raise UnsafeError("an opcode straddles the end of its frame")
    m.framed = False
    return position


def _binput(m: Machine, at: int) -> int:
    m.memo[m.data[at]] = m.stack[-1]
    return at + 1


def _long_binput(m: Machine, at: int) -> int:
    m.memo[_read_u4(m.data, at)[0]] = m.stack[-1]
    return at + 4


def _put(m: Machine, at: int) -> int:
    index, at = _decimal(m, at)
    m.memo[index] = m.stack[-1]
    return at


def _memoize(m: Machine, at: int) -> int:
    m.memo[len(m.memo)] = m.stack[-1]
    return at


def _binget(m: Machine, at: int) -> int:
    m.stack.append(m.memo[m.data[at]])
    return at + 1


def _long_binget(m: Machine, at: int) -> int:
    m.stack.append(m.memo[_read_u4(m.data, at)[0]])
    return at + 4


def _get(m: Machine, at: int) -> int:
    index, at = _decimal(m, at)
    m.stack.append(m.memo[index])
    return at


# --- scalars


def _constant(value: bool | None) -> Operation:
    def push(m: Machine, at: int) -> int:
        m.stack.append(value)
        return at

    return push


def _binint1(m: Machine, at: int) -> int:
    m.stack.append(m.data[at])
    return at + 1


def _fixed(layout: struct.Struct) -> Operation:
    read, size = layout.unpack_from, layout.size

    def push(m: Machine, at: int) -> int:
        m.stack.append(read(m.data, at)[0])
        return at + size

    return push


def _decimal(m: Machine, at: int) -> tuple[int, int]:
    digits, at = m.line(at)
    if len(digits) > m.limits.text_digits:
        raise UnsafeError(f"an integer of {len(digits)} digits")
    return int(digits.rstrip(b"L")), at


def _int(m: Machine, at: int) -> int:
    if m.data[at : at + 3] in (b"00\n", b"01\n"):  # how protocol 0 spells False and True
        m.stack.append(m.data[at + 1] == 0x31)
        return at + 3
    value, at = _decimal(m, at)
    m.stack.append(value)
    return at


def _long(layout: struct.Struct) -> Operation:
    def push(m: Machine, at: int) -> int:
        length = _number(layout, m.data, at)
        if length > m.limits.long_bytes:
            raise UnsafeError(f"an integer of {length} bytes")
        at += layout.size
        m.stack.append(int.from_bytes(m.take(at, length), "little", signed=True))
        return at + length

    return push


def _float(m: Machine, at: int) -> int:
    digits, at = m.line(at)
    m.stack.append(float(digits))
    return at


# --- text and bytes


def _text(layout: struct.Struct) -> Operation:
    read, size = layout.unpack_from, layout.size

    def push(m: Machine, at: int) -> int:
        start = at + size
        end: int = start + read(m.data, at)[0]
        text = m.data[start:end] if end <= m.length else m.take(start, end - start)
        m.stack.append(text.decode("utf-8", "surrogatepass"))
        return end

    return push


def _unicode(m: Machine, at: int) -> int:
    escaped, at = m.line(at)
    m.stack.append(escaped.decode("raw-unicode-escape"))
    return at


def _bytes(layout: struct.Struct) -> Operation:
    def push(m: Machine, at: int) -> int:
        length = _number(layout, m.data, at)
        at += layout.size
        m.stack.append(m.take(at, length))
        return at + length

    return push


def _bytearray(m: Machine, at: int) -> int:
    at = OPERATIONS[_BINBYTES8](m, at)
    m.stack[-1] = bytearray(m.stack[-1])
    return at


def _python2_text(data: bytes) -> str | bytes:
    """Python 2 has one type for both: text where it is UTF-8, as `torch.load` takes it."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _python2_str(layout: struct.Struct) -> Operation:
    def push(m: Machine, at: int) -> int:
        length = _number(layout, m.data, at)
        at += layout.size
        m.stack.append(_python2_text(m.take(at, length)))
        return at + length

    return push


def _string(m: Machine, at: int) -> int:
    quoted, at = m.line(at)
    quoted = quoted.rstrip()
    if len(quoted) < 2 or quoted[:1] not in (b"'", b'"') or quoted[-1:] != quoted[:1]:
        raise DamagedError("a string is not quoted")
    m.stack.append(_python2_text(codecs.escape_decode(quoted[1:-1])[0]))
    return at


# --- containers


def _tuple(m: Machine, at: int) -> int:
    items = tuple(m.stack)
    m.stack = m.marks.pop()
    m.stack.append(items)
    return at


def _short_tuple(length: int) -> Operation:
    def push(m: Machine, at: int) -> int:
        stack = m.stack
        if len(stack) < length:
            raise IndexError
        items = tuple(stack[-length:])
        del stack[-length:]
        stack.append(items)
        return at

    return push


def _empty(make: Callable[[], Node]) -> Operation:
    def push(m: Machine, at: int) -> int:
        m.stack.append(make())
        return at

    return push


def _list(m: Machine, at: int) -> int:
    items = m.pop_mark()
    m.stack.append(items)
    return at


def _dict(m: Machine, at: int) -> int:
    items = m.pop_mark()
    m.stack.append({})
    _set_items(m, m.stack[-1], items)
    return at


def _empty_set(m: Machine, at: int) -> int:
    m.stack.append(Inert(_SET, ([],)))
    return at


def _frozenset(m: Machine, at: int) -> int:
    items = m.pop_mark()
    m.stack.append(Inert(_FROZENSET, (items,)))
    return at


def _append(m: Machine, at: int) -> int:
    item = m.stack.pop()
    _extend(m.stack[-1], [item])
    return at


def _appends(m: Machine, at: int) -> int:
    items = m.pop_mark()
    _extend(m.stack[-1], items)
    return at


def _extend(holder: Node, items: list[Node]) -> None:
    if isinstance(holder, list):
        holder.extend(items)
    elif isinstance(holder, Inert):
        holder.items.extend(items)
    else:
        raise UnsafeError(f"something is appended to a {type(holder).__name__}")


def _additems(m: Machine, at: int) -> int:
    items = m.pop_mark()
    holder = m.stack[-1]
    if not isinstance(holder, Inert) or holder.function != _SET:
        raise UnsafeError(f"something is added to a {type(holder).__name__}")
    holder.args[0].extend(items)
    return at


def _setitem(m: Machine, at: int) -> int:
    value, key = m.stack.pop(), m.stack.pop()
    _set_items(m, m.stack[-1], [key, value])
    return at


def _setitems(m: Machine, at: int) -> int:
    items = m.pop_mark()
    _set_items(m, m.stack[-1], items)
    return at


def _set_items(m: Machine, holder: Node, items: list[Node]) -> None:
    if len(items) % 2:
        raise DamagedError("a key has no value")
    pairs = zip(items[::2], items[1::2], strict=True)
    if isinstance(holder, dict):
        for key, value in pairs:
            if type(key) is not str:
                m.check_key(key)
            holder[key] = value
    elif isinstance(holder, Inert):
        holder.pairs.extend(pairs)
    else:
        raise UnsafeError(f"an item of a {type(holder).__name__} is set")


# --- names, calls, objects: all inert


def _global(m: Machine, at: int) -> int:
    module, at = m.line(at)
    name, at = m.line(at)
    m.stack.append(m.name(module.decode("utf-8"), name.decode("utf-8")))
    return at


def _stack_global(m: Machine, at: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise UnsafeError("a class is named by something other than text")
    m.stack.append(m.name(module, name))
    return at


def _reduce(m: Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)
    return at


def _newobj(m: Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args, "newobj")
    return at


def _newobj_ex(m: Machine, at: int) -> int:
    kwargs, args = m.stack.pop(), m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args, "newobj_ex", kwargs)
    return at


def _inst(m: Machine, at: int) -> int:
    at = _global(m, at)
    cls = m.stack.pop()
    args = tuple(m.pop_mark())
    m.stack.append(m.call(cls, args, "obj"))
    return at


def _obj(m: Machine, at: int) -> int:
    cls, *args = m.pop_mark()
    m.stack.append(m.call(cls, tuple(args), "obj"))
    return at


def _build(m: Machine, at: int) -> int:
    state = m.stack.pop()
    holder = m.stack[-1]
    if isinstance(holder, Inert) and not holder.has_state:
        holder.has_state, holder.state = True, state
    elif isinstance(holder, OrderedMap) and holder.attributes is None:
        holder.attributes = state
    else:
        raise UnsafeError(f"a {type(holder).__name__} is given state that it cannot have")
    return at


def _binpersid(m: Machine, at: int) -> int:
    m.stack[-1] = m.persistent(m.stack[-1])
    return at


def _persid(m: Machine, at: int) -> int:
    text, at = m.line(at)
    m.stack.append(m.persistent(text.decode("utf-8")))
    return at


def _extension(m: Machine, at: int) -> NoReturn:
    raise UnsafeError(
        "a class is named by an extension code, which means nothing outside its program"
    )


def _out_of_band(m: Machine, at: int) -> NoReturn:
    raise UnsupportedError("its buffers were pickled out of band and are not in the file")


def _unknown(m: Machine, at: int) -> NoReturn:
    raise DamagedError(f"there is no pickle opcode 0x{m.data[at - 1]:02x}", hint=RETRY)


_MARK, _BINBYTES8 = 0x28, 0x8E
_SET, _FROZENSET = Global("builtins", "set"), Global("builtins", "frozenset")

_TABLE: dict[bytes, Operation] = {
    b"(": _mark, b".": _stop, b"0": _pop, b"1": _pop_mark, b"2": _dup,
    b"\x80": _proto, b"\x95": _frame,
    b"p": _put, b"q": _binput, b"r": _long_binput, b"\x94": _memoize,
    b"g": _get, b"h": _binget, b"j": _long_binget,
    b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False),
    b"I": _int, b"J": _fixed(_I4), b"K": _binint1, b"M": _fixed(_U2),
    b"L": _int, b"\x8a": _long(_U1), b"\x8b": _long(_I4),
    b"F": _float, b"G": _fixed(_F8),
    b"V": _unicode, b"\x8c": _text(_U1), b"X": _text(_U4), b"\x8d": _text(_U8),
    b"S": _string, b"U": _python2_str(_U1), b"T": _python2_str(_I4),
    b"C": _bytes(_U1), b"B": _bytes(_U4), b"\x8e": _bytes(_U8), b"\x96": _bytearray,
    b")": _empty(tuple), b"\x85": _short_tuple(1), b"\x86": _short_tuple(2),
    b"\x87": _short_tuple(3), b"t": _tuple,
    b"]": _empty(list), b"l": _list, b"a": _append, b"e": _appends,
    b"}": _empty(dict), b"d": _dict, b"s": _setitem, b"u": _setitems,
    b"\x8f": _empty_set, b"\x90": _additems, b"\x91": _frozenset,
    b"c": _global, b"\x93": _stack_global, b"R": _reduce, b"b": _build,
    b"\x81": _newobj, b"\x92": _newobj_ex, b"i": _inst, b"o": _obj,
    b"P": _persid, b"Q": _binpersid,
    b"\x82": _extension, b"\x83": _extension, b"\x84": _extension,
    b"\x97": _out_of_band, b"\x98": _out_of_band,
}  # fmt: skip
OPERATIONS = [_TABLE.get(bytes([code]), _unknown) for code in range(256)]
