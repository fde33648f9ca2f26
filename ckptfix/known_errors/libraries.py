"""What libraries around torch say: transformers, Lightning, DeepSpeed, DCP and others."""

from __future__ import annotations

from ckptfix.hints import command
from ckptfix.known_errors.known import Known

_INSPECT = command("inspect", "FILE")
_TO_SAFETENSORS = command("convert", "FILE", "OUT.safetensors")

ROWS = (
    Known(
        "torch-load-vulnerability",
        (
            "a serious vulnerability issue in `torch.load`",
            "requires users to upgrade torch to at least v2.6",
            "CVE-2025-32434",
        ),
        "transformers refuses pickled files under torch before 2.6; it takes safetensors.",
        _TO_SAFETENSORS,
        "ValueError: Due to a serious vulnerability issue in `torch.load`, even with "
        "`weights_only=True`, we now require users to upgrade torch to at least v2.6 in order to "
        "use the function. See the vulnerability report here "
        "https://nvd.nist.gov/vuln/detail/CVE-2025-32434",
    ),
    Known(
        "transformers-unreadable",
        (
            "Unable to load weights from pytorch checkpoint file",
            "Unable to load weights from checkpoint file for",
        ),
        "transformers could not read the file: it is damaged, or is something else.",
        _INSPECT,
        "OSError: Unable to load weights from pytorch checkpoint file for 'pytorch_model.bin'.",
    ),
    Known(
        "no-weights-file",
        (
            "no file named pytorch_model.bin",
            "no file named model.safetensors",
            "no file named diffusion_pytorch_model",
            "does not appear to have a file named pytorch_model.bin",
            "does not appear to have a file named model.safetensors",
            "Can't find a checkpoint index",
            "Error no file named",
            "Can't find 'adapter_config.json'",
            "does not appear to have a file named config.json",
        ),
        "The folder has no file of the name that the library looks for. It may have another: a "
        "name of a training program, or only an adapter (`adapter_model.safetensors`), shards "
        "without their index, or pieces.",
        "List the folder; `ckptfix inspect FOLDER` says what is in it, and `ckptfix convert FOLDER "
        "model.safetensors` makes one file of shards or pieces.",
        "OSError: Error no file named pytorch_model.bin, model.safetensors, tf_model.h5, "
        "model.ckpt.index or flax_model.msgpack found in directory ./out.",
    ),
    Known(
        "missing-metadata",
        (
            "does not contain the valid metadata",
            "Incompatible safetensors file",
            'metadata.get("format")',
            "'NoneType' object has no attribute 'get' … metadata",
        ),
        "transformers wants the entry `format: pt` in the metadata of a safetensors file.",
        _TO_SAFETENSORS,
        "OSError: The safetensors archive passed at model.safetensors does not contain the valid "
        "metadata. Make sure you save your model with the `save_pretrained` method.",
    ),
    Known(
        "not-lightning",
        ("KeyError: 'pytorch-lightning_version'",),
        "Lightning wants a checkpoint of its own; this is a plain state dict: load it with "
        "load_state_dict.",
        _INSPECT,
        "KeyError: 'pytorch-lightning_version'",
    ),
    Known(
        "lightning-arguments",
        ("__init__() missing … required positional argument",),
        "Where load_from_checkpoint says it: Lightning builds the model with the hyper-parameters "
        "that the checkpoint keeps, and it keeps none of these names.",
        "Give them: Net.load_from_checkpoint(FILE, name=value), and call "
        "self.save_hyperparameters() in __init__ from now on.",
        "TypeError: Net.__init__() missing 1 required positional argument: 'hidden_size'",
    ),
    Known(
        "deepspeed-keys",
        (
            "is not a model state checkpoint",
            "is not a zero checkpoint",
            "KeyError: 'module'",
            "KeyError: 'param_shapes'",
            "KeyError: 'ds_version'",
            "KeyError: 'buffer_names'",
        ),
        "DeepSpeed keeps a model's weights under `module` among other things; the file is laid out "
        "otherwise.",
        _INSPECT,
        "ValueError: mp_rank_00_model_states.pt is not a model state checkpoint",
    ),
    Known(
        "world-size",
        (
            "checkpoint being loaded used a DP world size of",
            "dp world size",
            "but the current world size is",
            "ZeroRedundancyOptimizer: world size",
            "The checkpoint was saved with … ranks",
        ),
        "The optimizer was saved in parts by another number of processes than now run.",
        "Start as many processes as saved it, or make one file of the weights with zero_to_fp32.py "
        "and begin with a new optimizer.",
        "ZeRORuntimeException: The checkpoint being loaded used a DP world size of 8 but the "
        "current world size is 4. Automatic adjustment of ZeRO's optimizer state partitioning "
        "with a new world size is not currently supported.",
    ),
    Known(
        "deepspeed-folder",
        (
            "Unable to find 'latest' file at",
            "Unable to find latest file at",
            "can't find zero checkpoint files",
            "can't find … files in directory",
            "_optim_states.pt … does not exist",
        ),
        "DeepSpeed looks for the folder that training saved: `latest` in it names the step, whose "
        "folder has a file of each process.",
        "Give the folder above that of the step, with every file of every process in it.",
        "ValueError: Unable to find 'latest' file at ./out/latest",
    ),
    Known(
        "dcp-folder",
        (
            "CheckpointException ranks",
            "/.metadata'",
            "metadata is None",
            "No such file or directory: '….distcp'",
        ),
        "torch.distributed.checkpoint reads a folder with a `.metadata` file and the `.distcp` "
        "files of every process; a part is absent, or something else was given.",
        command("check", "FILE"),
        "torch.distributed.checkpoint.api.CheckpointException: CheckpointException ranks:"
        "dict_keys([0])",
    ),
    Known(
        "one-rank",
        (
            'Need to initialize default process group using "init_process_group" before loading',
            "Default process group has not been initialized",
            "Need to initialize default process group",
            "`torch.distributed.tensor`` must be imported to load",
        ),
        "The file is that of one process of several: it holds pieces of the tensors.",
        command("convert", "FILE", "OUT"),
        'RuntimeError: Need to initialize default process group using "init_process_group" before '
        "loading ShardedTensor",
    ),
    Known(
        "not-basicsr",
        ("KeyError: 'params'", "KeyError: 'params_ema'"),
        "The program (BasicSR, Real-ESRGAN and kin) wants the weights in an entry of that name, "
        "and the file keeps them elsewhere.",
        _INSPECT,
        "KeyError: 'params_ema'",
    ),
    Known(
        "stylegan-persistence",
        (
            "_reconstruct_persistent_obj",
            "No module named 'torch_utils'",
            "No module named 'dnnlib'",
            "_pickle.UnpicklingError: … persistent_class",
        ),
        "StyleGAN's files carry the source of their classes, and run it where they are loaded. "
        "Its weights can be taken out without running it.",
        command("convert", "FILE", "OUT", weights_only=True),
        "AttributeError: Can't get attribute '_reconstruct_persistent_obj' on <module "
        "'torch_utils.persistence'>",
    ),
    Known(
        "yolo-attribute",
        (
            "'Upsample' object has no attribute 'recompute_scale_factor'",
            "object has no attribute 'recompute_scale_factor'",
            "'GELU' object has no attribute 'approximate'",
            "'Hardswish' object has no attribute 'inplace'",
            "'SiLU' object has no attribute 'inplace'",
            "object has no attribute '_non_persistent_buffers_set'",
            "object has no attribute '_modules'",
            "object has no attribute 'padding_mode'",
            "object has no attribute 'track_running_stats'",
            "object has no attribute 'batch_first'",
            "object has no attribute 'proj_size'",
            "object has no attribute '_is_full_backward_hook'",
            "object has no attribute 'total_ops'",
        ),
        "The file holds a whole model as an older torch pickled it, whose layers lack what the "
        "torch of now asks them for. The weights are whole: put them into a model that is built "
        "anew.",
        command("convert", "FILE", "OUT", weights_only=True),
        "AttributeError: 'Upsample' object has no attribute 'recompute_scale_factor'",
    ),
)
