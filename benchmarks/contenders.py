"""What is compared: the works, and for each work the programs that do it.

A command is a list of words in which `IN` and `OUT` stand for the input and the output, and `COPY`
for another file that holds what the input holds. The recipes
strip `module.` and tag `cpu` at once, as they are pasted; conversions leave keys alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CKPTFIX = (sys.executable, "-m", "ckptfix")

# What web pages tell people to paste.
RECIPE = """\
import sys, torch
from collections import OrderedDict
state_dict = torch.load(sys.argv[1], map_location="cpu")
new_state_dict = OrderedDict()
for k, v in state_dict.items():
    new_state_dict[k[7:]] = v
torch.save(new_state_dict, sys.argv[2])
"""

# The best of it that torch and its friends offer.
LOAD_MAPPED = """\
import sys, torch
state_dict = torch.load(sys.argv[1], map_location="cpu", mmap=True)
"""
MMAP_SAVE = LOAD_MAPPED + "torch.save({k[7:]: v for k, v in state_dict.items()}, sys.argv[2])"
MMAP_SAFETENSORS = LOAD_MAPPED + (
    "from safetensors.torch import save_file; save_file(state_dict, sys.argv[2])"
)
MMAP_HUB = LOAD_MAPPED + (
    "import os; os.mkdir(sys.argv[2])\n"
    "from huggingface_hub import save_torch_state_dict\n"
    "save_torch_state_dict(state_dict, sys.argv[2], max_shard_size='1TB')"
)
MERGEKIT = """\
import sys
from mergekit.io.loader import LazyPickleLoader
from safetensors.torch import save_file
loader = LazyPickleLoader(sys.argv[1], device="cpu")
save_file({k: loader.get_tensor(k) for k in loader.keys()}, sys.argv[2])
"""
CAST = """\
import sys, torch
from safetensors.torch import save_file
state_dict = torch.load(sys.argv[1], map_location="cpu", mmap=True)
save_file({k: v.to(torch.bfloat16) for k, v in state_dict.items()}, sys.argv[2])
"""
SAFETENSORS_SAVE = """\
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""
DCP_TO_TORCH = """\
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
TORCH_TO_DCP = LOAD_MAPPED + (
    "from torch.distributed.checkpoint import FileSystemWriter, save\n"
    "save(state_dict, storage_writer=FileSystemWriter(sys.argv[2]), no_dist=True)"
)


@dataclass(frozen=True, slots=True)
class Contender:
    """One program. A `peer` is optional: it runs only where it is installed."""

    name: str
    command: tuple[str, ...]
    peer: str = ""
    holds: bool = False
    """Whether it holds the whole checkpoint in memory, and runs only where there is enough."""

    @property
    def is_ckptfix(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.command[: len(CKPTFIX)] == CKPTFIX

    def words(self, source: Path, target: Path) -> list[str]:
        """The command for these two files."""
        places = {"IN": str(source), "OUT": str(target), "COPY": str(copy_of(source))}
        return [places.get(word, word) for word in self.command]


def copy_of(source: Path) -> Path:
    """Where the copy of an input lies."""
    return source.with_name(f"copy-of-{source.name}")


@dataclass(frozen=True, slots=True)
class Work:
    """One thing to be done, by several programs in turn.

    `reads` is the input: a `.pt` or a `.safetensors` file or a folder of pieces (`rows`, `columns`)
    of each size, or one of `COUNTED`, which are many small tensors. `writes` is the suffix of OUT,
    nothing where there is no output. With `in_place`, IN is a fresh copy for each run.
    """

    name: str
    title: str
    reads: str
    writes: str
    contenders: tuple[Contender, ...]
    in_place: bool = False


def ckptfix(name: str, *words: str) -> Contender:
    """A run of ckptfix, by the Python that runs the benchmark."""
    return Contender(f"ckptfix {name}", (*CKPTFIX, *words))


def script(
    name: str, code: str, python: str = sys.executable, peer: str = "", *, holds: bool = False
) -> Contender:
    """A few lines of Python that read IN and write OUT, as a process of its own."""
    return Contender(name, (python, "-c", code, "IN", "OUT"), peer, holds)


COUNTED = ("many", "many-pieces")
"""The inputs of many small tensors, whose size is the number of them."""

CP_FOLDER = Contender("cp -r", ("cp", "-r", "IN", "OUT"))
CP = Contender("cp", ("cp", "IN", "OUT"))
# ckptfix syncs what it writes; cp alone does not.
CP_SYNC = Contender("cp + fsync", ("sh", "-c", 'cp "$0" "$1" && sync "$1"', "IN", "OUT"))
RECIPES = (
    script("pasted recipe", RECIPE, holds=True),
    script("torch.load(mmap) + torch.save", MMAP_SAVE),
)
NO_MODULE = ("--sub", r"^module\.", "")


def works(peers: str) -> tuple[Work, ...]:
    """All works. `peers` is the Python in whose environment the optional programs are looked for.

    Programs that are compared with each other stand side by side: they run in this order.
    """
    strip = ckptfix("strip-prefix", "strip-prefix", "IN", "OUT")
    convert = ckptfix("convert", "convert", "IN", "OUT")
    to_safetensors = (
        convert,
        CP,
        CP_SYNC,
        script("torch.load(mmap) + save_file", MMAP_SAFETENSORS),
        *_peers(peers),
    )
    return (
        Work(
            "strip-prefix",
            "strip-prefix and to-cpu, .pt to .pt",
            "pt",
            ".pt",
            (strip, CP, ckptfix("to-cpu", "to-cpu", "IN", "OUT"), CP_SYNC, *RECIPES),
        ),
        Work("to-safetensors", ".pt to .safetensors", "pt", ".safetensors", to_safetensors),
        Work(
            "from-safetensors",
            ".safetensors to .pt",
            "safetensors",
            ".pt",
            (
                convert,
                CP,
                CP_SYNC,
                script("load_file + torch.save", SAFETENSORS_SAVE),
            ),
        ),
        Work(
            "cast",
            "float32 to bfloat16, .pt to .safetensors",
            "pt",
            ".safetensors",
            (
                ckptfix("convert --dtype", "convert", "IN", "OUT", "--dtype", "bf16"),
                script("torch.load(mmap) + .to + save_file", CAST),
            ),
        ),
        Work(
            "read-data",
            "check --read-data, .pt",
            "pt",
            "",
            (
                ckptfix("check --read-data", "check", "--read-data", "IN"),
                Contender("cmp", ("cmp", "IN", "COPY")),
            ),
        ),
        Work("in-place", "edits in place, .pt", "pt", "", _in_place(), in_place=True),
        Work("many", "strip-prefix of many small tensors", "many", ".pt", (strip, *RECIPES)),
        Work(
            "inspect",
            "inspect, beside the import of torch",
            "pt",
            "",
            (
                ckptfix("inspect", "inspect", "IN"),
                Contender("import torch", (sys.executable, "-c", "import torch")),
            ),
        ),
        *_pieces(convert),
    )


def _pieces(convert: Contender) -> tuple[Work, ...]:
    """Works on folders of torch.distributed.checkpoint."""
    rivals = (CP_FOLDER, script("dcp_to_torch_save", DCP_TO_TORCH, holds=True))
    return (
        Work("rows", "DCP folder to .pt, rows of four ranks", "rows", ".pt", (convert, *rivals)),
        Work(
            "columns",
            "DCP folder to .pt, columns of four ranks",
            "columns",
            ".pt",
            (convert, *rivals),
        ),
        Work(
            "to-dcp",
            ".pt to a DCP folder",
            "pt",
            ".dcp",
            (
                ckptfix("convert --to dcp", "convert", "IN", "OUT", "--to", "dcp"),
                CP,
                script("torch.load(mmap) + dcp.save", TORCH_TO_DCP),
            ),
        ),
        Work(
            "many-pieces",
            "DCP folder of many small tensors to .pt",
            "many-pieces",
            ".pt",
            (convert, rivals[1]),
        ),
        Work(
            "inspect-pieces",
            "inspect of a DCP folder, beside that of one file",
            "rows",
            "",
            (
                ckptfix("inspect", "inspect", "IN"),
                ckptfix("inspect, one file", "inspect", "COPY"),
            ),
        ),
    )


def _in_place() -> tuple[Contender, ...]:
    verbs = (("strip-prefix", ()), ("to-cpu", ()), ("rename", NO_MODULE))
    return tuple(
        ckptfix(f"{verb} --in-place", verb, "--in-place", "IN", *options) for verb, options in verbs
    )


def _peers(python: str) -> tuple[Contender, ...]:
    sft = str(Path(python).parent / "sft")
    return (
        script(
            "torch.load(mmap) + save_torch_state_dict", MMAP_HUB, python, peer="huggingface_hub"
        ),
        script("mergekit's lazy loader + save_file", MERGEKIT, python, "mergekit", holds=True),
        Contender("sft-cli convert", (sft, "convert", "IN", "-o", "OUT"), "sft", holds=True),
    )


def missing(contender: Contender, python: str) -> str | None:
    """Why a program cannot take part, or None."""
    if shutil.which(contender.command[0]) is None:
        return f"{Path(contender.command[0]).name} is not installed"
    if contender.peer and not _imports(python, contender.peer):
        return f"{contender.peer} is not installed"
    if "--in-place" in contender.command and not _knows(contender, "--in-place"):
        return "this ckptfix has no --in-place"
    return None


def _imports(python: str, module: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0


def _knows(contender: Contender, option: str) -> bool:
    verb = contender.command[len(CKPTFIX)]
    told = subprocess.run([*CKPTFIX, verb, "--help"], capture_output=True, text=True, check=False)
    return option in told.stdout
