"""Names that run commands or code, told from names of data."""

from __future__ import annotations

import pytest

from ckptfix.pickles.dangerous import is_dangerous
from ckptfix.tree.document import Global

DANGEROUS = """
posix system, nt system, os popen, subprocess Popen, __builtin__ eval, __builtin__ execfile,
builtins exec, builtins open, builtins __import__, builtins print, runpy _run_code,
webbrowser open, shutil rmtree, pathlib Path.unlink, operator attrgetter, commands getoutput,
pip main, _pickle loads, marshal loads, importlib import_module, socket create_connection,
ctypes CDLL, code InteractiveInterpreter, timeit timeit, http.client HTTPSConnection, torch.hub
load,
torch load, numpy load, numpy.testing._private.utils runstring, sys exit, io open, _io FileIO,
logging.config fileConfig, tempfile mkdtemp, asyncio run, codecs open, pydoc pipepager,
torch.serialization os.system, torch os, uuid os.system, functools os, their_project.utils sys.exit,
torch.nn Module.__init__.__globals__, argparse __builtins__
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
numpy.random._pickle __randomstate_ctor, torch.fx.graph_module reduce_graph_module, zoneinfo
ZoneInfo
"""


def names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in text.split(",")]


@pytest.mark.parametrize("name", names(DANGEROUS))
def test_what_runs_commands_or_reaches_out_is_told(name: str) -> None:
    assert is_dangerous(Global(*name.split()))


@pytest.mark.parametrize("name", names(DATA))
def test_what_is_data_is_left_in_peace(name: str) -> None:
    assert not is_dangerous(Global(*name.split()))
