"""The table of error texts that people meet when a checkpoint does not load.

They are those of torch (0.3 to 2.13), safetensors, transformers, Lightning and DeepSpeed. Texts
change between versions, so each is known by the part that stays. `docs/errors.md` is this table.
"""

from __future__ import annotations

from typing import NamedTuple

from ckptfix.hints import Command, command, shell


class Known(NamedTuple):
    """One known error. In `command`, FILE stands for the checkpoint and OUT for the new file.

    The first row that fits a paragraph explains it, so the more special rows come first.
    """

    code: str
    pattern: str
    """A regular expression for the part that stays. It has no `.*`, which would look through the
    rest of a log again at each place where the pattern begins: see `then`."""
    cause: str
    command: Command
    example: str
    """The text as its library prints it, or the part that matters."""
    then: str | None = None
    """What has to follow later in the paragraph, as another regular expression."""


KNOWN = (
    Known(
        "device-cuda",
        r"Attempting to deserialize object on a CUDA\s+device but torch\.cuda\.is_available\(\)",
        "The checkpoint was saved from a GPU, and this machine has none.",
        command("to-cpu", "FILE", "OUT"),
        "RuntimeError: Attempting to deserialize object on a CUDA device but "
        "torch.cuda.is_available() is False.",
    ),
    Known(
        "device-index",
        r"Attempting to deserialize object on [A-Z]\w* device \d+ but torch\.\w+\.device_count\(\)|"
        r"invalid device ordinal",
        "The checkpoint was saved from a GPU whose number this machine does not have.",
        command("to-cpu", "FILE", "OUT"),
        "RuntimeError: Attempting to deserialize object on CUDA device 3 but "
        "torch.cuda.device_count() is 1.",
    ),
    Known(
        "device-other",
        r"don't know how to restore data location of|"
        r"Attempting to deserialize object on an? (?:MPS|XPU|HPU|NPU|[A-Z]\w+) device",
        "The checkpoint was saved from a kind of device that this torch does not know.",
        command("to-cpu", "FILE", "OUT"),
        "RuntimeError: don't know how to restore data location of torch.storage.UntypedStorage "
        "(tagged with npu:0)",
    ),
    Known(
        "prefix-missing",
        r"Missing key\(s\) in state_dict: \"module\.",
        "The model is wrapped in DataParallel or DDP; the checkpoint comes from one that was not.",
        command("add-prefix", "FILE", "OUT"),
        "RuntimeError: Error(s) in loading state_dict for DataParallel: Missing key(s) in "
        'state_dict: "module.0.weight". Unexpected key(s) in state_dict: "0.weight".',
        then=r"Unexpected key\(s\) in state_dict: \"(?!module\.)",
    ),
    Known(
        "prefix-module",
        r"Unexpected key\(s\) in state_dict: |unexpected key (?=\"module\.)",
        "The checkpoint was saved from a model wrapped in DataParallel or DDP, which puts "
        "`module.` before every key.",
        command("strip-prefix", "FILE", "OUT"),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"0.weight". Unexpected key(s) in state_dict: "module.0.weight".',
        then=r"\"module\.",
    ),
    Known(
        "prefix-compile",
        r"Unexpected key\(s\) in state_dict: ",
        "The checkpoint was saved from a model compiled with torch.compile.",
        command("strip-prefix", "FILE", "OUT"),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"0.weight". Unexpected key(s) in state_dict: "_orig_mod.0.weight".',
        then=r"_orig_mod\.",
    ),
    Known(
        "prefix-fsdp",
        r"Unexpected key\(s\) in state_dict: ",
        "The checkpoint comes from a model wrapped by FSDP, activation checkpointing or Fabric.",
        command("strip-prefix", "FILE", "OUT"),
        "RuntimeError: Error(s) in loading state_dict for Net: Unexpected key(s) in state_dict: "
        '"_fsdp_wrapped_module.0.weight".',
        then=r"_(?:fsdp_wrapped|checkpoint_wrapped|forward)_module\.",
    ),
    Known(
        "shape-mismatch",
        r"size mismatch for [^\s:]+: copying a param|While copying the parameter named|"
        r"ignore_mismatched_sizes",
        "A tensor has another shape than the model's: another number of classes, another size of "
        "vocabulary, or another configuration of the model.",
        command("check", "FILE", model="M"),
        "RuntimeError: Error(s) in loading state_dict for Net: size mismatch for fc.weight: "
        "copying a param with shape torch.Size([1000, 512]) from checkpoint, the shape in current "
        "model is torch.Size([10, 512]).",
    ),
    Known(
        "keys-differ",
        r"(?:Missing|Unexpected) key\(s\) in state_dict|unexpected key \"|"
        r"missing keys? in state_dict|"
        r"were not (?:used when initializing|initialized from the model checkpoint)",
        "The names in the checkpoint are not those of the model.",
        command("fix", "FILE", "OUT", model="M"),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"head.weight".',
    ),
    Known(
        "weights-only-tar",
        r"Cannot use ``weights_only=True`` with files saved in the legacy \.tar format",
        "The file is in torch's container of 2017, which weights_only=True does not read.",
        command("convert", "FILE", "OUT"),
        "RuntimeError: Cannot use ``weights_only=True`` with files saved in the legacy .tar "
        "format.",
    ),
    Known(
        "weights-only-torchscript",
        r"Cannot use ``weights_only=True`` with TorchScript archives",
        "The file is a TorchScript program; its weights can be taken out of it.",
        command("convert", "FILE", "OUT.safetensors"),
        "RuntimeError: Cannot use ``weights_only=True`` with TorchScript archives passed to "
        "``torch.load``.",
    ),
    Known(
        "lfs-pointer",
        r"invalid load key, 'v'|Unsupported operand 118\b",
        "The file is a git-lfs pointer, a few lines of text that stand for the real file.",
        shell("git", "lfs", "pull", "--include", "FILE"),
        "_pickle.UnpicklingError: invalid load key, 'v'.",
    ),
    Known(
        "html",
        r"invalid load key, '<'|Unsupported operand 60\b",
        "The file is a web page, as a download link gives where it wants a login.",
        command("inspect", "FILE"),
        "_pickle.UnpicklingError: invalid load key, '<'.",
    ),
    Known(
        "not-a-pickle",
        r"invalid load key, '|Unsupported operand \d+",
        "The file is not a checkpoint of torch's, or is in another container: a safetensors file, "
        "an archive, a text.",
        command("inspect", "FILE"),
        r"_pickle.UnpicklingError: invalid load key, '\xc0'.",
    ),
    Known(
        "one-rank",
        r"Need to initialize default process group using \"init_process_group\" before loading|"
        r"`torch\.distributed\.tensor`` must be imported to load",
        "The file is that of one process of several: it holds pieces of the tensors.",
        command("convert", "FILE", "OUT"),
        'RuntimeError: Need to initialize default process group using "init_process_group" before '
        "loading ShardedTensor",
    ),
    Known(
        "blocked-globals",
        r"Weights only load failed|Unsupported (?:global|class) \w|WeightsUnpickler error:|"
        r"was not an allowed global",
        "The file holds objects of classes that weights_only=True refuses, beside the weights.",
        command("convert", "FILE", "OUT", weights_only=True),
        "_pickle.UnpicklingError: Weights only load failed. WeightsUnpickler error: Unsupported "
        "global: GLOBAL argparse.Namespace was not an allowed global by default.",
    ),
    Known(
        "windows-path",
        r"cannot instantiate '(?:WindowsPath|PosixPath)' on your system",
        "The checkpoint holds a path object of another operating system.",
        command("convert", "FILE", "OUT", weights_only=True),
        "NotImplementedError: cannot instantiate 'WindowsPath' on your system",
    ),
    Known(
        "missing-class",
        r"Can't get attribute '[\w.]+' on <module|'module' object has no attribute '\w+'",
        "The file holds a whole pickled model, or an object, whose class is not defined here.",
        command("convert", "FILE", "OUT", weights_only=True),
        "AttributeError: Can't get attribute 'Net' on <module '__main__' (built-in)>",
    ),
    Known(
        "missing-module",
        r"(?:ModuleNotFound|Import)Error: No module named",
        "The file holds objects of a package that is not installed here.",
        command("convert", "FILE", "OUT", weights_only=True),
        "ModuleNotFoundError: No module named 'their_project'",
    ),
    Known(
        "zip-truncated",
        r"failed finding central directory|not a ZIP archive",
        "The file is cut short, as by a download or a copy that broke off.",
        command("check", "FILE"),
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central "
        "directory",
    ),
    Known(
        "zip-damaged",
        r"PytorchStreamReader failed|invalid header or archive is corrupted|file read failed",
        "A part of the file is missing or overwritten.",
        command("check", "FILE"),
        "RuntimeError: PytorchStreamReader failed locating file data/0: file not found",
    ),
    Known(
        "write-failed",
        r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing|No space left on device",
        "torch.save could not write everything, mostly because the disk was full; what it left is "
        "no checkpoint.",
        command("check", "FILE"),
        "RuntimeError: [enforce fail at inline_container.cc:603] . unexpected pos 320 vs 214",
    ),
    Known(
        "truncated",
        r"unexpected EOF[.,]|pickle data was truncated|"
        r"storage has wrong (?:byte )?size",
        "The file is cut short.",
        command("check", "FILE"),
        "RuntimeError: unexpected EOF, expected 8 more bytes. The file might be corrupted.",
    ),
    Known(
        "empty",
        r"EOFError: Ran out of input",
        "The file is empty or nearly so, or it was read before (seek to its start).",
        command("inspect", "FILE"),
        "EOFError: Ran out of input",
    ),
    Known(
        "pickle-damaged",
        r"unpickling stack underflow|could not find MARK|unsupported pickle protocol|"
        r"A load persistent id instruction was encountered|Invalid magic number; corrupt file",
        "The pickle in the file is damaged, or is not a pickle that this Python reads by itself.",
        command("inspect", "FILE"),
        "_pickle.UnpicklingError: unpickling stack underflow",
    ),
    Known(
        "safetensors-truncated",
        r"incomplete metadata, file not fully covered|MetadataIncompleteBuffer",
        "The safetensors file is cut short, or something was added to its end.",
        command("check", "FILE"),
        "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, "
        "file not fully covered",
    ),
    Known(
        "safetensors-header",
        r"Error while deserializing header|HeaderTooLarge|InvalidHeader|header too (?:large|small)",
        "The file is not a safetensors file, whatever its name: a torch checkpoint, a git-lfs "
        "pointer, a web page, or the beginning is missing.",
        command("inspect", "FILE"),
        "safetensors_rust.SafetensorError: Error while deserializing header: header too large",
    ),
    Known(
        "shared-memory",
        r"Some tensors share memory, this will lead to duplicate memory on disk|"
        r"The weights trying to be saved contained shared tensors",
        "The model has tied tensors, which safetensors' save_file does not write.",
        command("convert", "FILE", "OUT.safetensors"),
        "RuntimeError: Some tensors share memory, this will lead to duplicate memory on disk and "
        "potential differences when loading them again: [{'embed.weight', 'lm_head.weight'}].",
    ),
    Known(
        "non-contiguous",
        r"You are trying to save a non contiguous tensor",
        "A tensor is transposed or a view, which safetensors' save_file does not write.",
        command("convert", "FILE", "OUT.safetensors"),
        "ValueError: You are trying to save a non contiguous tensor: `w` which is not allowed.",
    ),
    Known(
        "missing-metadata",
        r"does not contain the valid metadata|Incompatible safetensors file|"
        r"metadata\.get\(\"format\"\)",
        "transformers wants the entry `format: pt` in the metadata of a safetensors file.",
        command("convert", "FILE", "OUT.safetensors"),
        "OSError: The safetensors archive passed at model.safetensors does not contain the valid "
        "metadata. Make sure you save your model with the `save_pretrained` method.",
    ),
    Known(
        "torch-too-old",
        r"is a zip archive \(did you mean to use torch\.jit\.load\(\)\?\)|"
        r"Attempted to read a PyTorch file with version \d+, but the maximum supported version",
        "The file was saved by a newer torch than the one that reads it; both read safetensors.",
        command("convert", "FILE", "OUT.safetensors"),
        "RuntimeError: model.pt is a zip archive (did you mean to use torch.jit.load()?)",
    ),
    Known(
        "mmap-legacy",
        r"mmap can only be used with files saved with",
        "Only torch's newer container can be memory-mapped.",
        command("convert", "FILE", "OUT"),
        "RuntimeError: mmap can only be used with files saved with "
        "`torch.save(_use_new_zipfile_serialization=True), please torch.save your checkpoint with "
        "this option in order to use mmap.",
    ),
    Known(
        "transformers-unreadable",
        r"Unable to load weights from pytorch checkpoint file",
        "transformers could not read the file: it is damaged, or is something else.",
        command("inspect", "FILE"),
        "OSError: Unable to load weights from pytorch checkpoint file for 'pytorch_model.bin'.",
    ),
    Known(
        "not-lightning",
        r"KeyError: 'pytorch-lightning_version'",
        "Lightning wants a checkpoint of its own; this is a plain state dict: load it with "
        "load_state_dict.",
        command("inspect", "FILE"),
        "KeyError: 'pytorch-lightning_version'",
    ),
    Known(
        "deepspeed-keys",
        r"is not a (?:model state|zero) checkpoint|"
        r"KeyError: '(?:module|param_shapes|ds_version|buffer_names)'",
        "DeepSpeed keeps a model's weights under `module` among other things; the file is laid out "
        "otherwise.",
        command("inspect", "FILE"),
        "ValueError: mp_rank_00_model_states.pt is not a model state checkpoint",
    ),
    Known(
        "not-a-model",
        r"'(?:collections\.)?OrderedDict' object has no attribute '\w+'|"
        r"'dict' object has no attribute '(?:eval|to|cuda|cpu|(?:load_)?state_dict|parameters)'",
        "The file holds a state dict, not a model: build the model, then load_state_dict.",
        command("check", "FILE", model="M"),
        "AttributeError: 'collections.OrderedDict' object has no attribute 'eval'",
    ),
    Known(
        "not-a-state-dict",
        r"Expected state_dict to be dict-like, got",
        "The file holds a whole model; its state dict can be taken out of it.",
        command("convert", "FILE", "OUT", weights_only=True),
        "TypeError: Expected state_dict to be dict-like, got "
        "<class 'torch.nn.modules.linear.Linear'>.",
    ),
    Known(
        "optimizer-groups",
        r"loaded state dict (?:contains a parameter group that doesn't match|has a different "
        r"number)",
        "The optimizer was saved for another set of parameters than the model has now.",
        command("inspect", "FILE"),
        "ValueError: loaded state dict contains a parameter group that doesn't match the size of "
        "optimizer's group",
    ),
)
