"""What unpicklers say: refused classes, absent ones, other versions, damage."""

from __future__ import annotations

from ckptfix.hints import command
from ckptfix.known_errors.known import Known

_INSPECT = command("inspect", "FILE")
_CONVERT = command("convert", "FILE", "OUT")
_WEIGHTS = command("convert", "FILE", "OUT", weights_only=True)

ROWS = (
    Known(
        "numpy-version",
        ("No module named 'numpy._core", "No module named numpy._core"),
        "The file holds values of numpy 2, and this program has numpy 1. The weights need neither.",
        _WEIGHTS,
        "ModuleNotFoundError: No module named 'numpy._core'",
    ),
    Known(
        "newer-rebuild",
        (
            "Can't get attribute '_rebuild_",
            "has no attribute '_rebuild_",
            "Can't get attribute '_set_obj_state'",
        ),
        "The file was saved by a newer torch, which puts tensors together by a function that this "
        "one does not have.",
        command("convert", "FILE", "OUT.safetensors"),
        "AttributeError: Can't get attribute '_rebuild_tensor_v3' on <module 'torch._utils'>",
    ),
    Known(
        "python-too-old",
        ("unsupported pickle protocol: 5", "unsupported pickle protocol: 4"),
        "The file was pickled by a newer Python than the one that reads it (protocol 5 is that of "
        "Python 3.8). It is not damaged.",
        _CONVERT,
        "ValueError: unsupported pickle protocol: 5",
    ),
    Known(
        "blocked-globals",
        (
            "was not an allowed global",
            "WeightsUnpickler error:",
            "Weights only load failed",
            "Unsupported global: GLOBAL",
            "Unsupported class ",
            "Trying to load unsupported GLOBAL",
            "Trying to instantiate unsupported class",
        ),
        "The file holds objects of classes that weights_only=True refuses, beside the weights.",
        _WEIGHTS,
        "_pickle.UnpicklingError: Weights only load failed. WeightsUnpickler error: Unsupported "
        "global: GLOBAL argparse.Namespace was not an allowed global by default.",
    ),
    Known(
        "python-2",
        (
            "'ascii' codec can't decode byte",
            "UnicodeDecodeError: 'utf-8' codec can't decode byte",
            "UnicodeDecodeError: 'utf8' codec can't decode byte",
        ),
        "Python 2 pickled texts in the file (then torch.load wants encoding='latin1'); or a "
        "program opened a checkpoint as a text.",
        _CONVERT,
        "UnicodeDecodeError: 'ascii' codec can't decode byte 0x8c in position 2: ordinal not in "
        "range(128)",
    ),
    Known(
        "opened-as-text",
        ("'charmap' codec can't decode", "'gbk' codec can't decode", "'cp950' codec can't decode"),
        "A program opened the file as a text. If it is a checkpoint, it has to be opened as bytes, "
        "open(path, 'rb'); a configuration wants encoding='utf-8'. The file is not damaged.",
        "Pass encoding='utf-8' where a text is opened, 'rb' where a checkpoint is.",
        "UnicodeDecodeError: 'charmap' codec can't decode byte 0x8d in position 103: character "
        "maps to <undefined>",
    ),
    Known(
        "windows-path",
        (
            "cannot instantiate 'WindowsPath' on your system",
            "cannot instantiate 'PosixPath' on your system",
            "No module named 'pathlib._local'",
        ),
        "The checkpoint holds a path object of another operating system, or of a newer Python.",
        _WEIGHTS,
        "NotImplementedError: cannot instantiate 'WindowsPath' on your system",
    ),
    Known(
        "missing-class",
        (
            "Can't get attribute '… on <module",
            "'module' object has no attribute '",
        ),
        "The file holds a whole pickled model, or an object, whose class is not defined here.",
        _WEIGHTS,
        "AttributeError: Can't get attribute 'Net' on <module '__main__' (built-in)>",
    ),
    Known(
        "missing-module",
        ("ModuleNotFoundError: No module named", "ImportError: No module named"),
        "The file holds objects of a package that is not installed here.",
        _WEIGHTS,
        "ModuleNotFoundError: No module named 'their_project'",
    ),
    Known(
        "torch-file-in-pickle",
        (
            "A load persistent id instruction was encountered",
            "persistent IDs in protocol 0 must be ASCII",
            "unsupported persistent id encountered",
            "NotImplementedError: persistent_load",
        ),
        "The file is one of torch.save's, and was opened with pickle.load (or joblib), which does "
        "not know where the tensors are. It is not damaged.",
        "Load it with torch.load.",
        "_pickle.UnpicklingError: A load persistent id instruction was encountered, but no "
        "persistent_load function was specified.",
    ),
    Known(
        "not-torch-pickle",
        ("Invalid magic number; corrupt file", "Invalid protocol version"),
        "The file is a pickle, but torch.save did not write it: pickle.dump or another program "
        "did.",
        _CONVERT,
        "RuntimeError: Invalid magic number; corrupt file?",
    ),
    Known(
        "pickle-damaged",
        (
            "unpickling stack underflow",
            "could not find MARK",
            "unsupported pickle protocol",
            "unexpected MARK found",
            "Memo value not found at index",
            "pop from empty list",
            "invalid opcode",
        ),
        "The pickle in the file is damaged, or is not a pickle that this Python reads by itself.",
        _INSPECT,
        "_pickle.UnpicklingError: unpickling stack underflow",
    ),
    Known(
        "missing-constructor",
        (
            "__new__() missing … required positional argument",
            "__setstate__() missing",
            "code() takes at most",
            "code expected at least",
            "code() argument 13 must be str, not int",
            "unknown opcode",
            "bad marshal data",
        ),
        "The file holds an object that another version of Python, or of its package, pickled.",
        _WEIGHTS,
        "TypeError: code() argument 13 must be str, not int",
    ),
)
