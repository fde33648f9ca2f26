"""Files that are cut short or damaged, or are something else than they are taken for."""

from __future__ import annotations

from ckptfix.hints import command, shell
from ckptfix.known_errors.known import Known

_INSPECT, _CHECK = command("inspect", "FILE"), command("check", "FILE")
_CONVERT = command("convert", "FILE", "OUT")
_TO_SAFETENSORS = command("convert", "FILE", "OUT.safetensors")

ROWS = (
    Known(
        "weights-only-tar",
        ("Cannot use ``weights_only=True`` with files saved in the legacy .tar format",),
        "The file is in torch's container of 2017, which weights_only=True does not read.",
        _CONVERT,
        "RuntimeError: Cannot use ``weights_only=True`` with files saved in the legacy .tar "
        "format.",
    ),
    Known(
        "weights-only-torchscript",
        ("Cannot use ``weights_only=True`` with TorchScript archives",),
        "The file is a TorchScript program; its weights can be taken out of it.",
        _TO_SAFETENSORS,
        "RuntimeError: Cannot use ``weights_only=True`` with TorchScript archives passed to "
        "``torch.load``.",
    ),
    Known(
        "pickle-protocol",
        (
            "pickle protocol … is not supported by weights_only",
            "Detected pickle protocol",
            "Unsupported operand 149",
            "Unsupported operand 140",
        ),
        "The file was saved with another pickle protocol than 2, which weights_only=True does not "
        "read.",
        _CONVERT,
        "_pickle.UnpicklingError: Weights only load failed. Detected pickle protocol 4 in the "
        "checkpoint, which was not the default pickle protocol used by `torch.load` (2).",
    ),
    Known(
        "lfs-pointer",
        ("invalid load key, 'v'", "Unsupported operand 118"),
        "The file is a git-lfs pointer, a few lines of text that stand for the real file.",
        shell("git", "lfs", "pull", "--include", "FILE"),
        "_pickle.UnpicklingError: invalid load key, 'v'.",
    ),
    Known(
        "html",
        ("invalid load key, '<'", "Unsupported operand 60"),
        "The file is a web page, as a download link gives where it wants a login.",
        _INSPECT,
        "_pickle.UnpicklingError: invalid load key, '<'.",
    ),
    Known(
        "not-a-pickle",
        ("invalid load key, '", "Unsupported operand "),
        "The file is not a checkpoint of torch's, or is in another container: a safetensors file, "
        "an archive, a text.",
        _INSPECT,
        r"_pickle.UnpicklingError: invalid load key, '\xc0'.",
    ),
    Known(
        "not-torchscript",
        (
            "failed locating file constants.pkl",
            "file not found: archive/constants.pkl",
            "file not found: …/constants.pkl",
            "file in archive is not in a subdirectory",
            "version_ … code/__torch__",
            "is not a TorchScript",
        ),
        "torch.jit.load was given a file that is no TorchScript program: it is a checkpoint that "
        "torch.save wrote. Nothing in it is damaged.",
        "Load it with torch.load, and put it into a model with load_state_dict.",
        "RuntimeError: PytorchStreamReader failed locating file constants.pkl: file not found",
    ),
    Known(
        "no-data-pickle",
        (
            "file not found: archive/data.pkl",
            "file not found: …/data.pkl",
            "failed locating file data.pkl",
            "\"There is no item named '…data.pkl' in the archive\"",
        ),
        "The zip archive is none of torch.save's, or was packed again by hand: files in a zip, a "
        ".npz, or a program's own archive.",
        _INSPECT,
        "RuntimeError: PytorchStreamReader failed locating file data.pkl: file not found",
    ),
    Known(
        "no-version-record",
        (
            "failed locating file .data/version",
            "failed locating file version",
            "file not found: archive/version",
            "failed locating file byteorder",
            'Expected hasRecord("version") to be true',
        ),
        "The archive was packed again by hand, or by another program, and lacks what torch asks "
        "for.",
        _CONVERT,
        "RuntimeError: PytorchStreamReader failed locating file .data/version: file not found",
    ),
    Known(
        "tar-member-missing",
        ("filename 'storages' not found", "filename 'pickle' not found"),
        "The file is a tar archive that someone packed, not torch's container of 2017, for which "
        "torch.load takes it.",
        _INSPECT,
        "KeyError: \"filename 'storages' not found\"",
    ),
    Known(
        "zip-truncated",
        (
            "failed finding central directory",
            "not a ZIP archive",
            "BadZipFile: File is not a zip file",
            "BadZipfile: File is not a zip file",
            "EndOfCentralDirectory",
        ),
        "The file is cut short, as by a download or a copy that broke off; or it is no zip archive "
        "at all.",
        _CHECK,
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central "
        "directory",
    ),
    Known(
        "torch-too-old",
        (
            "is a zip archive (did you mean to use torch.jit.load()?)",
            "Attempted to read a PyTorch file with version",
            "kMaxSupportedFileFormatVersion",
            "kMinSupportedFileFormatVersion",
        ),
        "The file was saved by a newer torch than the one that reads it; both read safetensors.",
        _TO_SAFETENSORS,
        "RuntimeError: model.pt is a zip archive (did you mean to use torch.jit.load()?)",
    ),
    Known(
        "zip-damaged",
        (
            "PytorchStreamReader failed",
            "invalid header or archive is corrupted",
            "file read failed",
            "BadZipFile: Bad CRC-32",
            "BadZipFile: Bad magic number",
            "BadZipFile:",
            "Overlapped entries",
            "zlib.error: Error",
            "gzip.BadGzipFile",
            "CRC check failed",
        ),
        "A part of the file is missing or overwritten.",
        _CHECK,
        "RuntimeError: PytorchStreamReader failed locating file data/0: file not found",
    ),
    Known(
        "written-by-several",
        (
            "storage has wrong size: expected -",
            "storage has wrong byte size: expected -",
            "storage has wrong byte size: expected %ld got %ld1844674407",
        ),
        "Several processes wrote one file at once, or it is damaged: the sizes in it make no "
        "sense. It is not cut short.",
        "Save from one process only (if rank == 0), and take another copy of this file.",
        "RuntimeError: storage has wrong size: expected -4883529384820387209 got 512",
    ),
    Known(
        "truncated",
        (
            "unexpected EOF,",
            "unexpected EOF.",
            "pickle data was truncated",
            "storage has wrong size",
            "storage has wrong byte size",
            "Compressed file ended before the end-of-stream marker was reached",
            "EOFError: Ran out of … marshal",
            "unexpected end of data",
            "ReadError: unexpected end",
            "is smaller than the requested",
        ),
        "The file is cut short.",
        _CHECK,
        "RuntimeError: unexpected EOF, expected 8 more bytes. The file might be corrupted.",
    ),
    Known(
        "safetensors-truncated",
        ("incomplete metadata, file not fully covered", "MetadataIncompleteBuffer"),
        "The safetensors file is cut short, or something was added to its end.",
        _CHECK,
        "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, "
        "file not fully covered",
    ),
    Known(
        "safetensors-dtype",
        (
            "deserializing header: invalid JSON in header: unknown variant",
            "unknown variant `",
            "KeyError: 'F8_E",
            "KeyError: 'BF16'",
            "KeyError: 'F4'",
            "KeyError: 'U16'",
            "KeyError: 'C64'",
        ),
        "The file holds a dtype that this safetensors or torch is too old for, or that the numpy "
        "reader of safetensors does not know.",
        command("convert", "FILE", "OUT.safetensors", dtype="float32"),
        "safetensors_rust.SafetensorError: Error while deserializing header: invalid JSON in "
        "header: unknown variant `F8_E8M0`, expected one of `BOOL`, `U8`",
    ),
    Known(
        "safetensors-header",
        (
            "Error while deserializing header",
            "HeaderTooLarge",
            "HeaderTooSmall",
            "InvalidHeader",
            "header too large",
            "header too small",
            "InvalidOffset",
            "TensorInvalidInfo",
        ),
        "The file is not a safetensors file, whatever its name: a torch checkpoint, a git-lfs "
        "pointer, a web page, or the beginning is missing.",
        _INSPECT,
        "safetensors_rust.SafetensorError: Error while deserializing header: header too large",
    ),
    Known(
        "safetensors-no-tensor",
        ("File does not contain tensor",),
        "The file does not hold the tensor that its index, or the program, asks it for: it is of "
        "another save, or the names are other ones.",
        _INSPECT,
        "safetensors_rust.SafetensorError: File does not contain tensor lm_head.weight",
    ),
    Known(
        "empty",
        (
            "EOFError: Ran out of input",
            "EOFError: No data left in file",
            "RuntimeError: … is empty or",
            "failed finding central … size 0",
            "cannot mmap an empty file",
        ),
        "The file is empty or nearly so, or it was read before (seek to its start).",
        _INSPECT,
        "EOFError: Ran out of input",
    ),
    Known(
        "numpy-file",
        (
            "Cannot load file containing pickled data when allow_pickle=False",
            "This file contains pickled (object) data",
            "Object arrays cannot be loaded when allow_pickle=False",
            "the magic string is not correct; expected b'\\x93NUMPY'",
            "Failed to interpret file … as a pickle",
            "data type not understood",
        ),
        "numpy was given a file that is none of numpy's arrays: a checkpoint of torch's, or a "
        "pickle.",
        _INSPECT,
        "ValueError: Cannot load file containing pickled data when allow_pickle=False",
    ),
    Known(
        "mmap-legacy",
        ("mmap can only be used with files saved with",),
        "Only torch's newer container can be memory-mapped.",
        _CONVERT,
        "RuntimeError: mmap can only be used with files saved with "
        "`torch.save(_use_new_zipfile_serialization=True), please torch.save your checkpoint with "
        "this option in order to use mmap.",
    ),
)
