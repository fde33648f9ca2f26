"""Names that run commands or code, told from names of data."""

from __future__ import annotations

import functools
import io
import operator
import os
import pickle
import subprocess
import sys
import types
import typing
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptfix.door import read
from ckptfix.pickles.dangerous import Verdict, dangers, is_dangerous, judge, unknown_calls
from ckptfix.tree.document import Global

DANGEROUS = """
posix system, nt system, os popen, subprocess Popen, __builtin__ eval, __builtin__ execfile,
builtins exec, builtins open, builtins __import__, runpy _run_code,
webbrowser open, shutil rmtree, pathlib Path.unlink, commands getoutput,
pip main, _pickle loads, marshal loads, importlib import_module, socket create_connection,
ctypes CDLL, code InteractiveInterpreter, timeit timeit, http.client HTTPSConnection, torch.hub
load,
torch load, numpy load, numpy.testing._private.utils runstring, sys exit, io open, _io FileIO,
logging.config fileConfig, tempfile mkdtemp, asyncio run, codecs open, pydoc pipepager,
torch.serialization os.system, torch os, uuid os.system, functools os, their_project.utils sys.exit,
torch.nn Module.__init__.__globals__, argparse __builtins__,
uuid _get_command_stdout, typing _eval_type, types FunctionType, types CodeType, dataclasses
_create_fn, dataclasses dataclass, random _os, collections _starmap, string Formatter.get_field,
copyreg add_extension, uuid uuid1, time sleep, os.path exists, configparser ConfigParser.read,
torch.jit.unsupported_tensor_ops execWrapper, torch.fx.graph_module _exec_with_source,
torch.fx.graph_module _forward_from_src, torch.fx.graph_module reduce_graph_module,
torch.storage _load_from_bytes, torch.ops load_library, torch.storage UntypedStorage.from_file,
torch.distributed.distributed_c10d _tensor_to_object, torch.utils._config_module
ConfigModule.load_config, torch.jit._script script, torch._dynamo.guards GuardBuilder.get,
torch save, torch._C PyTorchFileReader, torch.nn.modules.module Module.load_state_dict,
numpy save, numpy.lib.npyio save, numpy.core memmap, numpy DataSource, numpy.ctypeslib load_library,
numpy.lib.utils safe_eval, numpy ndarray.tofile, numpy ndarray.dump, numpy apply_along_axis,
cloudpickle loads, cloudpickle.cloudpickle _make_function, dill loads, dill._dill _create_function,
dill._dill _load_type, pandas.core.computation.eval eval, hydra.utils instantiate, sympy sympify,
sympy.core.sympify sympify, IPython.utils.process system, their_project.storage load,
their_project.tools exec_
"""
DATA = """
argparse Namespace, collections defaultdict, datetime datetime, pathlib PosixPath, pathlib
WindowsPath,
functools partial, numpy.core.multiarray scalar, numpy dtype, torch._utils _rebuild_tensor_v2,
__builtin__ set, __builtin__ long, __builtin__ object, builtins slice, decimal Decimal, uuid UUID,
types SimpleNamespace, _io BytesIO, __main__ Net, torch.nn.modules.linear Linear, re _compile,
copy_reg _reconstructor, copyreg __newobj__, builtins ValueError, torch device, logging Logger,
inspect _ParameterKind, fractions Fraction, urllib.parse ParseResult, operator itemgetter,
their_project.os_utils Thing, omegaconf.dictconfig DictConfig, threading Lock, datetime
datetime.min,
numpy.random._pickle __randomstate_ctor, zoneinfo ZoneInfo, zoneinfo ZoneInfo._unpickle,
builtins print, time time, posixpath join, copy deepcopy, _operator xor, operator concat,
_heapq heappush, signal Signals, platform uname_result, subprocess CompletedProcess,
operator attrgetter, operator methodcaller, configparser ConfigParser, contextlib nullcontext,
torch._dynamo.eval_frame OptimizedModule, torch._dynamo.eval_frame OptimizeContext, torch._dynamo
convert_frame.CatchErrorsWrapper, torch.return_types max, torch.nn.backends.thnn
_get_thnn_function_backend, torch.jit._pickle build_intlist, numpy._core.multiarray _reconstruct,
numpy float64, torch.optim.adam Adam.__new__, typing ForwardRef, itertools chain, base64 b64decode
"""
UNKNOWN = """
their_project.utils make, sklearn.tree._tree __pyx_unpickle_Tree, torch_utils.persistence
_reconstruct_persistent_obj
"""


def names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in text.split(",")]


@pytest.mark.parametrize("name", names(DANGEROUS))
def test_what_runs_commands_or_reaches_out_is_told(name: str) -> None:
    assert is_dangerous(Global(*name.split()))


@pytest.mark.parametrize("name", names(UNKNOWN))
def test_what_nobody_knows_is_neither(name: str) -> None:
    assert judge(Global(*name.split()), called=True) is Verdict.UNKNOWN
    assert judge(Global(*name.split()), called=False) is Verdict.HARMLESS


@pytest.mark.parametrize("name", names(DATA))
def test_what_is_data_is_left_in_peace(name: str) -> None:
    assert not is_dangerous(Global(*name.split()))


# --- calls


class Call:
    """Pickles as a call, of a function or of what another call returns."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """What a call returns may be called."""


CANARY = "import os; os.system('touch canary')"


def made_of_code() -> Call:
    code = compile(CANARY, "x", "exec")
    fields = (
        "argcount posonlyargcount kwonlyargcount nlocals stacksize flags code consts names "
        "varnames filename name qualname firstlineno linetable exceptiontable freevars cellvars"
    )
    parts = [getattr(code, f"co_{field}") for field in fields.split()]
    return Call(Call(types.FunctionType, Call(types.CodeType, *parts), {}))


def system() -> Call:
    return Call(functools.reduce, getattr, ["os", "system"], torch.serialization)


def in_a_checkpoint_of_its_own() -> Call:
    inner = io.BytesIO()
    torch.save(Call(os.system, "touch canary"), inner)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


COMMANDS = {
    "a command": lambda: Call(os.system, "touch canary"),
    "code made into a function": made_of_code,
    "what a function finds": lambda: Call(system(), "touch canary"),
    "mapped": lambda: Call(list, Call(map, system(), ["touch canary"])),
    "a getter that is called": lambda: Call(
        Call(Call(operator.attrgetter, "os.system"), torch.serialization), "touch canary"
    ),
    "a getter that is mapped": lambda: Call(
        list, Call(map, Call(operator.attrgetter, "os.system"), [torch.serialization])
    ),
    "a part of a getter": lambda: Call(Call(functools.partial(getattr, torch.serialization), "os")),
    "a helper of uuid": lambda: Call(uuid._get_command_stdout, "touch", "canary"),  # type: ignore[attr-defined]
    "an annotation": lambda: Call(
        typing._eval_type,  # type: ignore[attr-defined]
        Call(typing.ForwardRef, "__import__('os').system('touch canary')"),
        {},
        {},
    ),
    "a helper of torch": lambda: Call(torch.fx.graph_module._exec_with_source, CANARY, {}),
    "a helper of torch in a map": lambda: Call(
        list, Call(map, torch.fx.graph_module._exec_with_source, [CANARY], [{}])
    ),
    "in place of a tensor": lambda: Call(
        torch._tensor._rebuild_from_type_v2,
        torch.utils._pytree.tree_map,
        torch.Tensor,
        (print, [1]),
        {},
    ),
    "pickled in bytes": in_a_checkpoint_of_its_own,
}


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(value: Any, path: str = "in.pt") -> Any:
    """A checkpoint with a value; modules are pickled by name, which takes a pickler of its own."""
    with Path(path).open("wb") as file:
        torch.save({"model": {"w": torch.ones(3)}, "x": value}, file, pickle_module=Modules)
    return read(path).root


class Modules:
    """A pickle module that pickles a module as its name: an attribute of the package it is in."""

    class Pickler(pickle._Pickler):
        def save(self, obj: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(obj, types.ModuleType):
                package, _, name = obj.__name__.rpartition(".")
            elif obj is types.FunctionType or obj is types.CodeType:
                package, name = "types", {"function": "FunctionType"}.get(obj.__name__, "CodeType")
            else:
                super().save(obj, *args, **kwargs)  # type: ignore[misc]
                return
            self.write(pickle.GLOBAL + f"{package}\n{name}\n".encode())  # type: ignore[attr-defined]

    Unpickler, load = pickle.Unpickler, pickle.load


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_that_runs_is_found_however_it_is_made(name: str) -> None:
    assert dangers(saved(COMMANDS[name]()))


FOUND_ONLY = ("a getter that is mapped", "a part of a getter")
"""What these get is a function or a module, which this file does not call."""
RUNS = [name for name in COMMANDS if name not in ("in place of a tensor", *FOUND_ONLY)]


@pytest.mark.usefixtures("in_tmp_path")
def test_torch_would_run_them() -> None:
    for at, name in enumerate(RUNS):
        saved(COMMANDS[name](), f"{at}.pt")
    code = """
import os, sys, torch
for at in range(int(sys.argv[1])):
    try:
        torch.load(f"{at}.pt", weights_only=False)
    except Exception:  # what is run may return what torch cannot use
        pass
    os.rename("canary", f"{at}.ran")
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(len(RUNS))], check=False, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def function(value: int) -> int:
    """What nobody else knows."""
    return value


HARMLESS = {
    "names": lambda: [print, os.path.join, sorted, torch.relu, operator.xor, function],
    "a partial": lambda: functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "a getter": lambda: operator.attrgetter("x"),
    "a type of None": lambda: type(None),
    "an object made with keywords": lambda: Keywords(lr=1),
    "a set": lambda: {1, 2},
    "a process that ended": lambda: subprocess.CompletedProcess(["git"], 0),
    "a device": lambda: torch.device("cuda:1"),
}


class Keywords:
    """An object that is made by `__new__` with keywords, for which old protocols want a partial."""

    lr: int

    def __new__(cls, *, lr: int) -> Keywords:
        made = super().__new__(cls)
        made.lr = lr
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"lr": self.lr}


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("name", HARMLESS)
def test_what_runs_nothing_is_no_danger(name: str) -> None:
    root = saved(HARMLESS[name]())
    assert not dangers(root)
    assert not unknown_calls(root)


@pytest.mark.usefixtures("in_tmp_path")
def test_a_call_of_what_nobody_knows_is_told_apart() -> None:
    root = saved([Call(function, 1), Call(list, Call(map, function, [1]))])
    assert not dangers(root)
    assert len(unknown_calls(root)) == 2
