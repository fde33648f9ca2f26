"""Which classes and functions do something when a pickle calls them: run commands, code, reach out.

Most names in a pickle stand for data: a Namespace, a date, a class of somebody's project. What of
Python's own library is not data is told from them here, and so is what other packages are known to
do. A name is only looked at, never imported; what a name that nobody knows does, it does not tell.
"""

from __future__ import annotations

import builtins
import sys
from typing import TYPE_CHECKING

from ckptfix.pickles.allowed import is_allowed
from ckptfix.tree.document import Global, Inert
from ckptfix.tree.walk import walk

if TYPE_CHECKING:
    from ckptfix.tree.document import Node


def is_dangerous(name: Global) -> bool:
    """Whether a class or function runs commands or code, or reaches files or the network."""
    if is_allowed(name):
        return False
    today = name.today if "." in name.today else f"builtins.{name.today}"
    if today in _HARMLESS:
        return False
    if today.startswith(_OTHERS):
        return True
    first, *parts = today.split(".")
    if any(part[:2] == part[-2:] == "__" for part in name.name.split(".")):
        return name.name not in ("__newobj__", "__newobj_ex__")  # a way to what lies around a class
    if first not in _LIBRARY and _REACHING.isdisjoint(parts):
        return False
    return not _is_data(today)


def dangers(root: Node) -> list[Global | Inert]:
    """Every call in a tree of what is dangerous, and every name of it that is not called."""
    found = [node for _, node in walk(root, tensors=False) if _reaches_out(node)]
    called = {id(node.function) for node in found if isinstance(node, Inert)}
    return [node for node in found if id(node) not in called]


def name_of(danger: Global | Inert) -> str:
    """What a call, or a name, reaches out to: `posix.system`."""
    return danger.today if isinstance(danger, Global) else danger.function.today


def _reaches_out(node: Node) -> bool:
    if type(node) is Global:
        return is_dangerous(node)
    if not isinstance(node, Inert) or type(node.function) is not Global:
        return False
    if node.function.today == "getattr":  # a method of an object, or what lies around its class
        name = node.args[1] if isinstance(node.args, tuple) and len(node.args) == 2 else "__"
        return type(name) is not str or name.startswith("__")
    return is_dangerous(node.function)


def _is_data(today: str) -> bool:
    """Whether a name of Python's own library stands for data, or for what only computes."""
    module = today.removesuffix(f".{today.rpartition('.')[2]}")
    while module and module not in _MODULES:  # the class that a class or a method belongs to
        module = module.rpartition(".")[0]
    inside = today.removeprefix(f"{module}.").split(".")
    if today in _NAMES:
        return True
    if not module or not _REACHING.isdisjoint(inside):
        return False
    if _MODULES[module] == "all":
        return len(inside) == 1 or inside[0] in _PURE or all(map(_is_class, inside))
    return all(map(_is_class, inside))


def _is_class(name: str) -> bool:
    """Whether a name is written as classes and constants are."""
    return name.lstrip("_")[:1].isupper()


_REACHING = frozenset({"os", "posix", "nt", "sys", "subprocess", "importlib", "builtins", "shutil"})
"""Modules that other modules have imported, and that can be reached through those."""

_LIBRARY = sys.stdlib_module_names | {
    "asynchat", "asyncore", "cgi", "cgitb", "commands", "crypt", "distutils", "imp", "lib2to3",
    "msilib", "nntplib", "pipes", "popen2", "smtpd", "telnetlib",
}  # fmt: skip
"""The modules of Python's own library, and those that it had once."""

_MODULES = {
    **dict.fromkeys(
        (
            "_codecs", "_collections", "_decimal", "_functools", "_random", "_struct", "array",
            "cmath", "codecs", "collections", "collections.abc", "copyreg", "dataclasses",
            "datetime", "_datetime", "_pydatetime", "decimal", "_pydecimal", "enum", "fractions",
            "functools", "ipaddress", "itertools", "math", "numbers", "random", "re", "string",
            "struct", "types", "typing", "uuid", "weakref", "_weakref", "_weakrefset",
        ),
        "all",
    ),
    **dict.fromkeys(
        (
            "_io", "abc", "argparse", "ast", "_ast", "calendar", "contextvars", "csv",
            "email.header", "email.message", "graphlib", "http", "inspect", "io", "json.decoder",
            "json.encoder", "logging", "multiprocessing.context", "pathlib", "pathlib._local",
            "queue", "socket", "statistics", "textwrap", "threading", "urllib.parse",
            "xml.etree.ElementTree", "zoneinfo",
        ),
        "classes",
    ),
}  # fmt: skip
"""Modules of which all, or the classes, are data or only compute."""

_PURE = {"Counter", "OrderedDict", "defaultdict", "date", "datetime", "time", "timedelta",
         "Decimal", "Fraction", "UUID"}  # fmt: skip
"""Classes whose methods only compute."""

_NAMES = frozenset(
    {
        *(f"builtins.{name}" for name, value in vars(builtins).items() if isinstance(value, type)),
        *(
            f"builtins.{name}"
            for name in (
                "Ellipsis", "NotImplemented", "abs", "all", "any", "basestring", "bin", "buffer",
                "chr", "cmp", "divmod", "format", "hash", "hex", "intern", "isinstance",
                "issubclass", "iter", "len", "long", "max", "min", "next", "oct", "ord", "pow",
                "repr", "round", "sorted", "sum", "unichr", "unicode", "xrange",
                "getattr", "hasattr", "bytes.fromhex", "bytes.maketrans", "dict.fromkeys",
                "float.fromhex",
                "int.from_bytes", "str.maketrans",
            )
        ),
        "_thread.RLock", "_thread.allocate_lock", "_thread.lock", "logging.getLogger",
        "operator.itemgetter", "_operator.itemgetter", "os.stat_result", "os.terminal_size",
        "posix.stat_result", "threading._RLock", "time.struct_time", "uuid.uuid4",
        *(f"{module}.{name}" for module in ("operator", "_operator")
          for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "eq", "ne",
                       "lt", "le", "gt", "ge", "and_", "or_", "not_", "getitem", "contains")),
    }
) - {"builtins.open"}  # fmt: skip
"""Single names of the library that are data, or only compute."""

_HARMLESS = frozenset({"torch._dynamo.decorators._DimRange"})
"""Names in packages of `_OTHERS` that torch itself pickles: with nested tensors."""

_OTHERS = (
    "_io.FileIO", "aiohttp.", "argparse.FileType", "codecs.open", "dill.source.", "httpx.",
    "io.FileIO", "joblib.load", "joblib.numpy_pickle.load",
    "numpy.f2py.", "numpy.fromfile", "numpy.load", "numpy.lib.npyio.load", "numpy.memmap",
    "numpy.testing.", "numpy.distutils.", "pandas.eval", "pandas.io.", "pandas.read_", "paramiko.",
    "pexpect.", "pip.", "pkg_resources.", "psutil.Popen", "ptyprocess.", "requests.", "setuptools.",
    "sh.", "torch._dynamo.", "torch._inductor.", "torch.hub.", "torch.jit.load", "torch.load",
    "torch.package.", "torch.serialization.load", "torch.utils.bottleneck.",
    "torch.utils.collect_env.", "torch.utils.cpp_extension.", "torch.utils.model_dump.",
    "urllib3.", "uuid._popen",
    "logging.FileHandler", "logging.config.", "socket.SocketType",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
    "torch.distributed.rpc.", "webbrowser.", "wget.", "yaml.load", "yaml.unsafe_load",
)  # fmt: skip
"""What of other packages runs commands or code, or reaches files or the network: how each begins.
Of the library, too, where most of a module is data."""
