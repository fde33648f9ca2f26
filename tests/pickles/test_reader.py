"""The machine that reads pickles: every opcode, nothing run, nothing unbounded."""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest

from ckptfix.errors import CkptfixError, DamagedError, ReadError, UnsafeError, UnsupportedError
from ckptfix.limits import Limits
from ckptfix.tree import compare, walk
from ckptfix.tree.document import Global, Inert, OrderedMap
from ckptfix.tree.rebuild import rebuild
from tests.helpers import comparable, laughs, peak_memory, read, u4, u8, write

if TYPE_CHECKING:
    from pathlib import Path

# --- every opcode

VALUES = {
    "INT": b"I-42\n.",
    "BININT": b"J\xfe\xff\xff\xff.",
    "BININT1": b"K\xff.",
    "BININT2": b"M\xff\xff.",
    "LONG": b"L-12345678901234567890L\n.",
    "LONG1": b"\x8a\x02\x00\xff.",
    "LONG4": b"\x8b\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01.",
    "STRING": b"S'a\\x62\\n\"'\n.",
    "BINSTRING": b"T\x03\x00\x00\x00a\xc3\xa9.",
    "SHORT_BINSTRING": b"U\x02ab.",
    "BINBYTES": b"B\x02\x00\x00\x00\xff\x00.",
    "SHORT_BINBYTES": b"C\x02\xff\x00.",
    "BINBYTES8": b"\x8e" + u8(2) + b"\xff\x00.",
    "BYTEARRAY8": b"\x96" + u8(2) + b"\xff\x00.",
    "NONE": b"N.",
    "NEWTRUE": b"\x88.",
    "NEWFALSE": b"\x89.",
    "UNICODE": b"Va\\u0416\xe9\n.",
    "SHORT_BINUNICODE": b"\x8c\x03a\xc3\xa9.",
    "BINUNICODE": b"X\x03\x00\x00\x00\xed\xa0\x80.",
    "BINUNICODE8": b"\x8d" + u8(1) + b"a.",
    "FLOAT": b"F-1e-7\n.",
    "BINFLOAT": b"G\x7f\xf0\x00\x00\x00\x00\x00\x00.",
    "EMPTY_LIST": b"].",
    "APPEND": b"]K\x01a.",
    "APPENDS": b"](K\x01K\x02e.",
    "LIST": b"(K\x01K\x02l.",
    "EMPTY_TUPLE": b").",
    "TUPLE": b"(K\x01K\x02K\x03K\x04t.",
    "TUPLE1": b"K\x01\x85.",
    "TUPLE2": b"K\x01K\x02\x86.",
    "TUPLE3": b"K\x01K\x02K\x03\x87.",
    "EMPTY_DICT": b"}.",
    "DICT": b"(K\x01K\x02d.",
    "SETITEM": b"}K\x01K\x02s.",
    "SETITEMS": b"}(K\x01K\x02K\x03K\x04u.",
    "EMPTY_SET": b"\x8f.",
    "ADDITEMS": b"\x8f(K\x01K\x02\x90.",
    "FROZENSET": b"(K\x01K\x02\x91.",
    "POP": b"K\x01K\x020.",
    "DUP": b"]2\x86.",
    "MARK": b"(K\x01l.",
    "POP_MARK": b"K\x01(K\x02K\x031.",
    "GET": b"]p300\ng300\n\x86.",
    "BINGET": b"]q\x07h\x07\x86.",
    "LONG_BINGET": b"]r\x00\x01\x00\x00j\x00\x01\x00\x00\x86.",
    "PUT": b"]p-0\n.",
    "BINPUT": b"]q\x07.",
    "LONG_BINPUT": b"]r\x00\x01\x00\x00.",
    "MEMOIZE": b"]\x94h\x00\x86.",
    "PROTO": b"\x80\x05N.",
    "STOP": b"N.",
    "FRAME": b"\x80\x04\x95" + u8(2) + b"N.",
}
"""By opcode, pickles that Python reads too."""

NAMED = Global("canary_module", "Canary")
_NAME = b"ccanary_module\nCanary\n"
OBJECTS = {
    "GLOBAL": (_NAME + b".", NAMED),
    "STACK_GLOBAL": (b"\x8c\x0dcanary_module\x8c\x06Canary\x93.", NAMED),
    "REDUCE": (_NAME + b"K\x01\x85R.", Inert(NAMED, (1,))),
    "BUILD": (_NAME + b")R}b.", Inert(NAMED, (), has_state=True, state={})),
    "INST": (b"(K\x01icanary_module\nCanary\n.", Inert(NAMED, (1,), how="obj")),
    "OBJ": (b"(" + _NAME + b"K\x01o.", Inert(NAMED, (1,), how="obj")),
    "NEWOBJ": (_NAME + b"K\x01\x85\x81.", Inert(NAMED, (1,), how="newobj")),
    "NEWOBJ_EX": (_NAME + b")}\x92.", Inert(NAMED, (), {}, "newobj_ex")),
    "PERSID": (b"Pabc\n.", ("pid", "abc")),
    "BINPERSID": (b"K\x01Q.", ("pid", 1)),
}
"""By opcode, pickles that name classes, and the inert trees that they become."""

REFUSED = {
    "EXT1": (b"\x82\x01.", UnsafeError, "extension code"),
    "EXT2": (b"\x83\x01\x00.", UnsafeError, "extension code"),
    "EXT4": (b"\x84\x01\x00\x00\x00.", UnsafeError, "extension code"),
    "NEXT_BUFFER": (b"\x97.", UnsupportedError, "out of band"),
    "READONLY_BUFFER": (b"N\x98.", UnsupportedError, "out of band"),
}


def test_each_opcode_that_python_knows_is_read_or_refused_by_name() -> None:
    assert {*VALUES, *OBJECTS, *REFUSED} == {op.name for op in pickletools.opcodes}
    pickled = VALUES | {name: row[0] for name, row in OBJECTS.items()}
    pickled |= {name: row[0] for name, row in REFUSED.items()}
    for name, data in pickled.items():
        assert name in {op.name for op, _, _ in pickletools.genops(data)}


@pytest.mark.parametrize("opcode", VALUES)
def test_values_are_what_python_reads(opcode: str) -> None:
    data = VALUES[opcode]
    expected = pickle.loads(data, encoding="utf-8")
    assert comparable(pickle.loads(write(read(data)))) == comparable(expected)


@pytest.mark.parametrize("opcode", OBJECTS)
def test_classes_and_persistent_ids_become_inert(opcode: str) -> None:
    data, expected = OBJECTS[opcode]
    assert compare.difference(read(data), expected) is None


@pytest.mark.parametrize("opcode", REFUSED)
def test_what_means_nothing_outside_its_program_is_refused(opcode: str) -> None:
    data, error, words = REFUSED[opcode]
    with pytest.raises(error, match=words):
        read(data)


def test_bytes_that_are_no_opcode_are_named() -> None:
    known = {ord(op.code) for op in pickletools.opcodes}
    for byte in set(range(256)) - known:
        with pytest.raises(DamagedError, match=f"no pickle opcode 0x{byte:02x}"):
            read(bytes([byte]) + b".")


def test_protocol_0_spells_booleans_as_integers() -> None:
    assert read(b"(I00\nI01\nI1\nI0\nt.") == (False, True, 1, 0)
    assert [type(value) for value in read(b"(I00\nI01\nI1\nt.")] == [bool, bool, int]


def test_python_2_strings_are_text_where_they_are_utf_8_and_bytes_otherwise() -> None:
    assert read(b"(U\x01aU\x02\xc3\xa9U\x01\xffS'\\xff'\nt.") == ("a", "é", b"\xff", b"\xff")


def test_python_2_pickles_of_ordered_dicts() -> None:
    found = read(b"ccollections\nOrderedDict\n(lp0\n(lp1\nS'a'\naI1\naa\x85R.")
    assert (type(found), found) == (OrderedMap, {"a": 1})


def test_the_position_after_the_pickle_is_returned() -> None:
    from ckptfix import pickles

    data = b"junk" + pickle.dumps([1]) + pickle.dumps({"a": 2}) + b"weights"
    first, position = pickles.read(data, lambda pid: pid, name="t", start=4)
    second, end = pickles.read(data, lambda pid: pid, name="t", start=position)
    assert (first, second, data[end:]) == ([1], {"a": 2}, b"weights")


def test_errors_name_the_pickle_and_the_place() -> None:
    with pytest.raises(DamagedError, match=r"^t\.pkl: byte 3: "):
        read(b"(K\x01K")


# --- damage


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_cut_anywhere_is_damaged(protocol: int) -> None:
    value = [OrderedDict(a=1.5, b=[b"x", "y", 1 << 80]), {2, 3}]
    data = pickle.dumps(value, protocol)
    for length in range(len(data)):
        with pytest.raises(ReadError):
            read(data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b".", b"0.", b"1.", b"2.", b"a.", b"e.", b"t.", b"R.", b"(R.",
        b"\x85.", b"K\x01\x86.", b"}K\x01s.", b"}(K\x01u.", b"(K\x01d.", b"q\x00.", b"h\x00.",
        b"gx\n.", b"g1", b"Ix\n.", b"F.\n.", b"Sab\n.", b"S'ab\n.", b"b.", b"Nb.", b"(o.", b"Q.",
        b"X\x02\x00\x00\x00\xff\xff.", b"V\\uzzzz\n.", b"S'\\x'\n.", b"\x81.", b")\x81.", b"\x93.",
        b"N)R.", b"K\x01K\x01\x93.", b"NNR.", b"cm\nn\nNR.", b"c\xff\nn\n.", b"NNa.", b"NNNs.",
        b"}]Ns.", b"}}Ns.", b"}\x96" + u8(0) + b"Ns.", b"}]\x85Ns.", b"]]\x90.", b"]]b.",
        b"N(K\x01\x90.",
        b"\x80\x06N.", b"\x80\xffN.", b"\x8b\xff\xff\xff\xff.", b"T\xff\xff\xff\xff.",
        b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.",
        b"(", b"",
    ],
)  # fmt: skip
def test_nonsense_is_one_error(data: bytes) -> None:
    with pytest.raises(ReadError, match=r"^t\.pkl: byte \d+: "):
        read(data)


# --- frames


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x95" + u8(1) + b"K\x01.", "straddles"),
        (b"\x95" + u8(20) + b"\x95" + u8(2) + b"N00000000000.", "inside a frame"),
        (b"\x95" + u8(100) + b"N.", "announced"),
        (b"\x95" + u8(2**63) + b"N.", "announced"),
    ],
)
def test_frames_that_straddle_reopen_or_overrun_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ReadError, match=words):
        read(b"\x80\x04" + data)


def test_pickles_of_several_frames_are_read() -> None:
    value = [b"x" * 70_000, ["y" * 40_000, "z" * 40_000], list(range(50_000))]
    for protocol in (4, 5):
        data = pickle.dumps(value, protocol)
        frames = [op.name for op, _, _ in pickletools.genops(data)].count("FRAME")
        assert frames > 1
        assert read(data) == value


# --- what asks for too much

_CLASS = b"cm\nn\n"
BOMBS = {
    "memo index 2**31": b"N" + b"r\x00\x00\x00\x80" + b"j\x00\x00\x00\x80\x86.",
    "memo index of 4000 digits": b"Np" + b"9" * 4000 + b"\n.",
    "memo index of a million digits": b"Np" + b"9" * 1_000_000 + b"\n.",
    "BINUNICODE8 of 2**62": b"\x8d" + u8(1 << 62) + b"abc.",
    "BINBYTES8 of 2**64 - 1": b"\x8e" + u8((1 << 64) - 1) + b".",
    "BYTEARRAY8 of 2**62": b"\x96" + u8(1 << 62) + b".",
    "BINBYTES of 4 GiB": b"B\xff\xff\xff\xff.",
    "LONG4 of 2 GiB": b"\x8b\xff\xff\xff\x7f.",
    "LONG4 of 1 MiB": b"\x8b" + u4(1 << 20) + b"\xff" * (1 << 20) + b".",
    "INT of 5000 digits": b"I" + b"9" * 5000 + b"\n.",
    "LONG of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "laughs of lists": laughs(100, b"]", b"l") + b".",
    "laughs of tuples": laughs(100, b")", b"t") + b".",
    "laughs of dicts": b"}q\x00" + b"".join(
        b"}(K\x00h%cK\x01h%cuq%c" % (i, i, i + 1) for i in range(100)) + b".",
    "laughs as a key": laughs(100, b")", b"t") + b"}h\x64Ns.",
    "laughs as a key of an OrderedDict":
        b"ccollections\nOrderedDict\n]" + laughs(100, b")", b"t") + b"N\x86a\x85R.",
    "laughs as arguments": laughs(100, b"]", b"l") + _CLASS + b"h\x64R.",
    "laughs as a function": laughs(100, b"]", b"l") + b"K\x01R.",
    "laughs called": laughs(100, b"]", b"l") + b")R.",
    "laughs inside an object called": _CLASS + laughs(100, b"]", b"l") + b"\x85RNR.",
    "laughs as a class name": laughs(100, b")", b"t") + b"h\x64\x93.",
    "laughs as state of a list": b"]" + laughs(100, b"]", b"l") + b"b.",
    "laughs appended to a tuple": laughs(100, b")", b"t") + b"h\x64a.",
    "a long class name": b"c" + b"a" * 2000 + b"\nb\n.",
    "a class name of dots": b"cm\n" + b"." * 100_000 + b"\n.",
    "a class name that grows": b"c__builtin__\ngetattr\nq\x00cm\nn\nX" + u4(500) + b"a" * 500
        + b"q\x01\x86R" + b"q\x020" + b"h\x00h\x02h\x01\x86Rq\x020" * 400 + b"h\x02.",
    "a key nested deep": b")" + b"\x85" * 100_000 + b"q\x000}h\x00Ns.",
}  # fmt: skip
"""By name, what a few bytes ask for."""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_whether_read_or_refused(name: str) -> None:
    data = BOMBS[name]
    refusal = ""
    with peak_memory(32 << 20):
        try:
            root = read(data)
            written = write(root)
            assert len(written) < 2 * len(data) + 1000
            assert compare.difference(root, read(written)) is None
            rebuild(root, lambda node: node)
            assert sum(1 for _ in walk.walk(root)) <= len(data)
        except CkptfixError as error:
            refusal = error.message
    assert len(refusal) < 5000


REFUSED_BOMBS = (
    "memo index of a million digits", "BINUNICODE8 of 2**62", "BINBYTES8 of 2**64 - 1",
    "BYTEARRAY8 of 2**62", "BINBYTES of 4 GiB", "LONG4 of 2 GiB", "LONG4 of 1 MiB",
    "INT of 5000 digits", "LONG of a million digits", "laughs as a key",
    "laughs as a key of an OrderedDict", "laughs as arguments", "laughs as a function",
    "laughs called", "a long class name", "a class name of dots", "a class name that grows",
    "a key nested deep",
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BOMBS)
def test_these_are_refused(name: str) -> None:
    with pytest.raises(ReadError):
        read(BOMBS[name])


def test_memo_indices_cost_nothing_however_large() -> None:
    assert read(b"]r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.") == ([], [])


def test_limits_can_be_raised() -> None:
    data = b"\x8b" + u4(1 << 17) + b"\x01" * (1 << 17) + b"."
    with pytest.raises(UnsafeError, match="131072 bytes"):
        read(data)
    assert read(data, limits=Limits(long_bytes=1 << 17)) == pickle.loads(data)


def test_a_tuple_of_scalars_is_a_fine_key() -> None:
    value = {(1, ("a", (2.5, None))): 1, b"x": 2, None: 3, True: 4, 5.5: 5}
    assert read(pickle.dumps(value)) == value


# --- class names that cannot be written in every protocol


@pytest.mark.parametrize("name", ["a\nb", "\n", "n\nR"])
def test_class_names_with_line_breaks_are_refused(name: str) -> None:
    text = name.encode()
    for data in (
        b"\x8c\x01m\x8c%c" % len(text) + text + b"\x93.",
        b"\x8c%c" % len(text) + text + b"\x8c\x01m\x93.",
        b"c__builtin__\ngetattr\ncm\nn\n\x8c%c" % len(text) + text + b"\x86R.",
    ):
        with pytest.raises(UnsafeError, match="line break"):
            read(data)


def test_class_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(ReadError):
        read(b"\x8c\x01m\x8c\x03\xed\xa0\x80\x93.")


def test_class_names_beyond_ascii_are_kept() -> None:
    assert read(write(Global("é", "Ж"))) == Global("é", "Ж")


# --- nothing is imported, nothing is run


class _Calls:
    """Pickles as a call, the way exploits are made."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def exploits(canary: Path) -> dict[str, bytes]:
    """Pickles that create `canary` when Python's own machine reads them, and relatives."""
    touch = f"touch {canary}"
    text = touch.encode()
    shell = b"X" + u4(len(text)) + text
    code = f"open({str(canary)!r}, 'w')".encode()
    expression = b"X" + u4(len(code)) + code
    name = b"ccanary_module\nCanary\n"
    made = {f"os.system, protocol {p}": pickle.dumps(_Calls(os.system, touch), p) for p in range(6)}
    made |= {f"eval, protocol {p}": pickle.dumps(_Calls(eval, code.decode()), p) for p in range(6)}
    return made | {
        "posix.system": b"cposix\nsystem\n" + shell + b"\x85R.",
        "os.system, protocol 0": b"cos\nsystem\n(S'" + text + b"'\ntR.",
        "os.system among values":
            b"}(X\x01\x00\x00\x00acos\nsystem\n" + shell + b"\x85RK\x01K\x02u.",
        "os.system, result dropped": b"cos\nsystem\n" + shell + b"\x85R0N.",
        "os.system by INST": b"(" + shell + b"ios\nsystem\n.",
        "os.system by OBJ": b"(cos\nsystem\n" + shell + b"o.",
        "os.system by STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93" + shell + b"\x85R.",
        "os.system by getattr": b"c__builtin__\ngetattr\nc__builtin__\n__import__\n"
            b"X\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00system\x86R" + shell + b"\x85R.",
        "eval of builtins": b"cbuiltins\neval\n" + expression + b"\x85R.",
        "nested getattr":
            b"c__builtin__\ngetattr\nccanary_module\nCanary\nX\x04\x00\x00\x00call\x86R)R.",
        "a dotted name": b"\x80\x04\x8c\x0dcanary_module\x8c\x0bCanary.call\x93)R.",
        "an import": b"ccanary_module\nCanary\n.",
        "REDUCE": name + b")R.",
        "NEWOBJ": name + b")\x81.",
        "NEWOBJ_EX": name + b")}\x92.",
        "__setstate__": name + b")\x81}b.",
        "__setitem__": name + b")\x81K\x01K\x02s.",
        "append": name + b")\x81K\x01a.",
        "__hash__ of a key": b"}" + name + b")\x81Ns.",
        "__hash__ of a member": b"\x8f(" + name + b")\x81\x90.",
        "add to a set": name + b")\x81(K\x01\x90.",
        "an extension code": b"\x82\x01.",
        "a larger extension code": b"\x84\x01\x00\x00\x00.",
        "a persistent id": name + b")RQ.",
        "a persistent id of text": b"Pcanary_module\n.",
    }  # fmt: skip


_MODULE = """
import pathlib
def touch(*_):
    pathlib.Path({canary!r}).touch()
touch()
class Canary:
    call = staticmethod(touch)
    __init__ = __setstate__ = __setitem__ = append = extend = __call__ = add = touch
    def __hash__(self):
        touch()
        return 1
"""

_VICTIM = """
import copyreg, pathlib, pickle, sys
copyreg.add_extension("canary_module", "Canary", 1)
way, folder = sys.argv[1], pathlib.Path(sys.argv[2])
if way == "pickle":
    for path in sorted(folder.glob("*.pkl")):
        try:
            pickle.loads(path.read_bytes())
        except Exception:
            pass
    sys.exit()
import ckptfix
from ckptfix import pickles
from ckptfix.tree.document import Inert
from ckptfix.tree.rebuild import rebuild
from ckptfix.tree.walk import walk
from ckptfix.errors import CkptfixError
read = refused = 0
for path in sorted(folder.glob("*.pkl")):
    try:
        root, _ = pickles.read(path.read_bytes(), lambda pid: pid, name=path.name)
        again, _ = pickles.read(pickles.write(root)[0], lambda pid: pid, name=path.name)
        list(walk(again))
        rebuild(root, lambda node: node)
        repr(root)
        read += 1
    except CkptfixError:
        refused += 1
for path in sorted(folder.glob("*.pt")):
    try:
        document = ckptfix.open(path)
        document.save(path.with_suffix(".out.pt"))
    except CkptfixError:
        pass
bad = [name for name in ("canary_module", "torch") if name in sys.modules]
print(read, refused, bad)
"""


def _run_victim(way: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(folder / "victim.py"), way, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_no_exploit_runs_and_nothing_is_imported(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = exploits(canary)
    (tmp_path / "canary_module.py").write_text(_MODULE.format(canary=str(canary)))
    (tmp_path / "victim.py").write_text(_VICTIM)
    for index, data in enumerate(pickled.values()):
        (tmp_path / f"{index:02}.pkl").write_bytes(data)
        with zipfile.ZipFile(tmp_path / f"{index:02}.pt", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    read_count, refused, bad = _run_victim("ckptfix", tmp_path).split(maxsplit=2)
    assert bad == "[]"
    assert int(read_count) + int(refused) == len(pickled)
    assert int(refused) == 3  # the two extension codes, and what is added to an unknown object
    assert not canary.exists()
    _run_victim("pickle", tmp_path)
    assert canary.exists()  # the trap works


@pytest.mark.parametrize("command", ["inspect", "check", "to-cpu", "strip-prefix", "convert"])
def test_no_command_runs_an_exploit(command: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        exploit = exploits(canary)["os.system among values"]
        archive.writestr("archive/data.pkl", exploit)
        archive.writestr("archive/version", "3\n")
    out = [] if command in ("inspect", "check") else [str(tmp_path / "out.pt")]
    words = [sys.executable, "-m", "ckptfix", command, str(path), *out]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr
    assert not canary.exists()
    pickle.loads(exploit)
    assert canary.exists()
