"""Names that run commands or code, told from names of data."""

from __future__ import annotations

import pytest

from ckptfix.pickles.dangerous import Verdict, is_dangerous, judge
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
