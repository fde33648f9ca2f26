"""What is known of the names in pickles: which are data, which run or reach out, which call others.

Python's own library, torch and numpy are there wherever a checkpoint is loaded. What they are
pickled with is listed, and the rest of their functions counts as dangerous where it is called: a
list of bad names would never be whole. Of all other packages, what is known to be bad is listed.
Names are those of Python 3, with `builtins.` in front where they have no module.
"""

from __future__ import annotations

import builtins
import sys


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _in(module: str, names: str) -> set[str]:
    return {f"{module}.{name}" for name in names.split()}


# --- Python's own library

LIBRARY = sys.stdlib_module_names | _words(
    "asynchat asyncore cgi cgitb commands crypt distutils imp lib2to3 msilib nntplib pipes "
    "popen2 smtpd telnetlib"
)
"""The modules of Python's own library, and those that it had once."""

REACHING = frozenset({"os", "posix", "nt", "sys", "subprocess", "importlib", "builtins", "shutil"})
"""Modules that other modules have imported, and that can be reached through those."""

COMPUTING = _words(
    "_bisect _codecs _collections _decimal _heapq _operator _random _struct _weakref "
    "_weakrefset array base64 binascii bisect cmath collections collections.abc colorsys "
    "datetime _datetime _pydatetime decimal _pydecimal difflib errno fnmatch fractions "
    "hashlib heapq hmac html ipaddress itertools json json.decoder json.encoder keyword math "
    "numbers operator random re secrets stat statistics string struct textwrap unicodedata "
    "urllib.parse weakref zlib"
)
"""Modules whose public names are data, or only compute."""

OF_DATA = COMPUTING | _words(
    "_io abc argparse ast _ast calendar codecs configparser contextlib contextvars csv "
    "dataclasses email.header email.message enum graphlib http http.cookies inspect io "
    "logging multiprocessing.context pathlib pathlib._local pprint queue signal socket "
    "threading time types typing uuid xml.etree.ElementTree zoneinfo"
)
"""Modules whose classes are data, or only compute."""

PURE = _words("Counter OrderedDict defaultdict date datetime time timedelta Decimal Fraction UUID")
"""Classes whose methods only compute."""

TYPES = frozenset(
    f"builtins.{name}" for name, value in vars(builtins).items() if isinstance(value, type)
)
"""The classes of Python itself."""

NAMES = frozenset(
    {
        *TYPES,
        *_in(
            "builtins",
            "Ellipsis NotImplemented abs all any ascii basestring bin buffer callable chr cmp "
            "divmod format hash hex id intern isinstance issubclass iter len long max min next oct "
            "ord pow print repr round sorted sum unichr unicode xrange getattr hasattr "
            "bytes.fromhex bytes.maketrans dict.fromkeys float.fromhex int.from_bytes "
            "str.maketrans",
        ),
        *_in("_functools", "partial reduce cmp_to_key"),
        *_in("functools", "partial partialmethod reduce cmp_to_key lru_cache wraps update_wrapper"),
        *_in("functools", "total_ordering cached_property"),
        *_in("copyreg", "_reconstructor __newobj__ __newobj_ex__"),
        *_in("copy", "copy deepcopy Error error"),
        *_in("codecs", "encode decode lookup"),
        *_in("contextlib", "nullcontext suppress closing"),
        *_in("dataclasses", "asdict astuple field fields is_dataclass replace"),
        *_in("enum", "auto unique property member nonmember"),
        *_in("time", "asctime ctime gmtime localtime mktime monotonic monotonic_ns perf_counter"),
        *_in("time", "perf_counter_ns process_time strftime strptime struct_time time time_ns"),
        *_in("typing", "cast get_args get_origin"),
        *_in("uuid", "uuid3 uuid4 uuid5"),
        *_in("subprocess", "CompletedProcess CalledProcessError SubprocessError TimeoutExpired"),
        *(
            f"{module}.{name}"
            for module in ("posixpath", "ntpath")
            for name in (
                "basename", "commonpath", "commonprefix", "dirname", "isabs", "join", "normcase",
                "normpath", "split", "splitdrive", "splitext",
            )
        ),
        "_thread.RLock", "_thread.allocate_lock", "_thread.lock", "array._array_reconstructor",
        "ast.literal_eval", "logging.getLogger", "os.stat_result", "os.terminal_size",
        "platform.uname_result", "posix.stat_result", "re._compile", "threading._RLock",
        "zoneinfo.ZoneInfo._unpickle",
    }
) - {"builtins.open"}  # fmt: skip
"""Single names of the library that are data, or only compute."""


# --- torch and numpy

ALWAYS_THERE = frozenset({"torch", "numpy"})
"""Packages, beside Python's own library, that are there wherever a checkpoint is loaded."""

CALLED_BY_THEM = frozenset(
    {
        *_in("torch", "device finfo iinfo"),
        *_in("torch._tensor", "_rebuild_from_type _rebuild_from_type_v2"),
        *_in("torch.fx.immutable_collections", "immutable_dict immutable_list"),
        *_in("torch.jit._pickle", "build_boollist build_doublelist build_intlist build_tensorlist"),
        *_in("torch.jit._pickle", "build_tensor_from_id restore_type_tag"),
        "torch.nested._internal.nested_tensor._rebuild_njt",
        "torch.nn.backends.thnn._get_thnn_function_backend",
        "torch.serialization._get_layout",
        *_in("numpy._core.multiarray", "_reconstruct scalar"),
        *_in("numpy.core.multiarray", "_reconstruct scalar"),
        *_in("numpy._core.numeric", "_frombuffer"),
        *_in("numpy.core.numeric", "_frombuffer"),
        *_in("numpy", "bool bool_ bytes_ complex64 complex128 datetime64 dtype float16 float32"),
        *_in("numpy", "float64 int8 int16 int32 int64 matrix ndarray poly1d recarray str_"),
        *_in("numpy", "timedelta64 uint8 uint16 uint32 uint64"),
        "numpy.ma.core._mareconstruct",
    }
)
"""What pickles of torch and numpy call, of their functions."""

MADE_BY_THEM = ("torch._utils._rebuild_", "torch.return_types.", "numpy.random.__",
                "numpy.random._pickle.__")  # fmt: skip
"""How others of them begin."""


# --- what runs commands or code, or reaches files or the network

DANGEROUS = (
    # of the library, where most of a module is data
    "_io.FileIO", "argparse.FileType", "codecs.open", "io.FileIO", "io.OpenWrapper",
    "logging.FileHandler", "logging.config.", "socket.SocketType", "types.CodeType",
    "types.FunctionType", "types.LambdaType",
    # of torch and numpy
    "torch._C.PyTorchFile", "torch._C._distributed_c10d.FileStore",
    "torch._C._distributed_c10d.TCPStore", "torch._export.load", "torch._inductor.codecache.",
    "torch.classes.load_library", "torch.distributed.FileStore", "torch.distributed.TCPStore",
    "torch.distributed.distributed_c10d._tensor_to_object", "torch.distributed.elastic.",
    "torch.distributed.launch.", "torch.distributed.rpc.", "torch.distributed.run.",
    "torch.export.load", "torch.from_file", "torch.fx.experimental.symbolic_shapes.ShapeEnv.",
    "torch.fx.graph_module._deserialize_graph_module", "torch.fx.graph_module._exec_with_source",
    "torch.fx.graph_module._forward_from_src", "torch.fx.graph_module.reduce_", "torch.hub.",
    "torch.jit.load", "torch.jit.save", "torch.jit.unsupported_tensor_ops.execWrapper",
    "torch.load", "torch.multiprocessing.reductions.", "torch.ops.load_library", "torch.package.",
    "torch.save", "torch.serialization.load", "torch.serialization.save",
    "torch.storage._load_from_bytes", "torch.testing._internal.", "torch.utils.bottleneck.",
    "torch.utils.collect_env.", "torch.utils.cpp_extension.", "torch.utils.model_dump.",
    "torch.utils.tensorboard.",
    "numpy.DataSource", "numpy._core.memmap", "numpy._core.records.fromfile", "numpy.core.memmap",
    "numpy.core.records.fromfile", "numpy.ctypeslib.", "numpy.distutils.", "numpy.f2py.",
    "numpy.fromfile", "numpy.genfromtxt", "numpy.lib._datasource.", "numpy.lib.format.",
    "numpy.lib.npyio.", "numpy.lib.utils.safe_eval", "numpy.load", "numpy.memmap",
    "numpy.rec.fromfile", "numpy.save", "numpy.testing.",
    # of others
    "IPython.", "_distutils_hack.", "aiohttp.", "boto3.", "botocore.", "cloudpickle.", "dill.",
    "execnet.", "fabric.", "fsspec.", "git.", "httplib2.", "httpx.", "huggingface_hub.",
    "hydra._internal.utils.", "hydra.utils.", "jinja2.", "joblib.dump", "joblib.load",
    "joblib.numpy_pickle.dump", "joblib.numpy_pickle.load", "jsonpickle.", "mako.", "numexpr.",
    "pandas.compat.pickle_compat.load", "pandas.core.computation.", "pandas.eval", "pandas.io.",
    "pandas.read_", "paramiko.", "pexpect.", "pip.", "pkg_resources.", "plumbum.", "psutil.Popen",
    "ptyprocess.", "ray.cloudpickle.", "requests.", "scipy.weave.", "setuptools.", "sh.",
    "sklearn.externals.joblib.", "sympy.parsing.", "urllib3.", "webbrowser.", "wget.", "zmq.",
)  # fmt: skip
"""How the names begin that run or reach out, wherever they stand."""

VERBS = _words(
    "call check_call check_output cmdexec compile download dump eval exec exec_ execfile "
    "execute from_file from_pretrained fromfile getoutput getstatusoutput import_module "
    "instantiate load load_library load_module load_url loads locate main open parse_expr "
    "popen read_file read_pickle run run_cmd save savez shell spawn subimport sympify system "
    "unsafe_load urlopen write_file"
)
"""How functions that run or reach out are called, in packages that nobody knows."""

CHANGING = frozenset(
    f"{module}.{name}"
    for module in ("operator", "_operator")
    for name in (
        "setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod",
        "imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor",
    )
)  # fmt: skip
"""What changes an object that it is given: dangerous where that is a part of the program."""


# --- what is judged by what it is given

ACCESSORS = frozenset(
    {
        "builtins.getattr",
        *(f"{module}.{name}" for module in ("operator", "_operator")
          for name in ("attrgetter", "getitem", "itemgetter", "methodcaller")),
    }
)  # fmt: skip
"""What gets anything out of an object: nobody can say what its result would do."""

CALLERS = frozenset(
    {
        *_in("builtins", "filter iter map max min next sorted"),
        *_in("functools", "reduce"), *_in("_functools", "reduce"),
        *_in("operator", "call"), *_in("_operator", "call"),
        *_in("itertools", "accumulate dropwhile filterfalse groupby starmap takewhile"),
        *_in("re", "sub subn Scanner"), *_in("heapq", "merge nlargest nsmallest"),
        *_in("weakref", "finalize"),
        *_in("torch._tensor", "_rebuild_from_type _rebuild_from_type_v2"),
    }
)  # fmt: skip
"""What calls the functions that it is given."""

PARTIAL = frozenset({"functools.partial", "_functools.partial"})
IMPORTING = frozenset({"numpy._core._ufunc_reconstruct", "numpy.core._ufunc_reconstruct"})
"""What imports the module that it is given: a ufunc's, in pickles of old numpy."""
