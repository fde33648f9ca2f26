"""Names and shapes that are not those of the model.

Which row fits, the lists of keys in the text say (`diagnose.pasted_keys`), but for the rows with
words of their own.
"""

from __future__ import annotations

from ckptfix.hints import command
from ckptfix.known_errors.known import Known

_FIX = command("fix", "FILE", "OUT", model="M")
_CHECK = command("check", "FILE", model="M")
_STRIP = command("strip-prefix", "FILE", "OUT")

ROWS = (
    Known(
        "nested-state-dict",
        (),
        "What was given to load_state_dict is a whole training checkpoint; the state dict is one "
        "of its entries.",
        command("convert", "FILE", "OUT", weights_only=True, select="SELECT"),
        "RuntimeError: Error(s) in loading state_dict for DataParallel: Missing key(s) in "
        'state_dict: "module.conv1.weight", "module.fc.bias". Unexpected key(s) in state_dict: '
        '"state_dict", "best_prec1", "epoch".',
    ),
    Known(
        "prefix-missing",
        (),
        "The model is wrapped in DataParallel or DDP; the checkpoint comes from one that was not.",
        command("add-prefix", "FILE", "OUT"),
        "RuntimeError: Error(s) in loading state_dict for DataParallel: Missing key(s) in "
        'state_dict: "module.0.weight". Unexpected key(s) in state_dict: "0.weight".',
    ),
    Known(
        "prefix-module",
        (),
        "The checkpoint was saved from a model wrapped in DataParallel or DDP, which puts "
        "`module.` before every key.",
        _STRIP,
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"0.weight". Unexpected key(s) in state_dict: "module.0.weight".',
    ),
    Known(
        "prefix-compile",
        (),
        "The checkpoint was saved from a model compiled with torch.compile.",
        _STRIP,
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"0.weight". Unexpected key(s) in state_dict: "_orig_mod.0.weight".',
    ),
    Known(
        "prefix-fsdp",
        (),
        "The checkpoint comes from a model wrapped by FSDP, activation checkpointing or Fabric.",
        _STRIP,
        "RuntimeError: Error(s) in loading state_dict for Net: Unexpected key(s) in state_dict: "
        '"_fsdp_wrapped_module.0.weight".',
    ),
    Known(
        "prefix-surplus",
        (),
        "The keys of the checkpoint begin with a name that those of the model do not have, as of "
        "a model that is a part of another one.",
        command("strip-prefix", "FILE", "OUT", prefix="PREFIX"),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"conv.weight", "fc.bias". Unexpected key(s) in state_dict: "model.conv.weight", '
        '"model.fc.bias".',
    ),
    Known(
        "prefix-lacking",
        (),
        "The keys of the model begin with a name that those of the checkpoint do not have, as of "
        "a model that keeps another one as its part.",
        command("add-prefix", "FILE", "OUT", prefix="PREFIX"),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"backbone.conv.weight", "backbone.fc.bias". Unexpected key(s) in state_dict: '
        '"conv.weight", "fc.bias".',
    ),
    Known(
        "prefix-replaced",
        (),
        "The keys of the checkpoint begin with another name than those of the model.",
        command("rename", "FILE", "OUT", sub=("^PREFIX", "REPLACED")),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"encoder.conv.weight", "encoder.fc.bias". Unexpected key(s) in state_dict: '
        '"backbone.conv.weight", "backbone.fc.bias".',
    ),
    Known(
        "averaged-model",
        (),
        "The checkpoint holds averages of the weights as AveragedModel keeps them.",
        _FIX,
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"fc.weight". Unexpected key(s) in state_dict: "n_averaged", "module.fc.weight".',
    ),
    Known(
        "placeholders",
        ("with shape torch.Size([0]) from checkpoint",),
        "The file holds empty placeholders for the weights, as DeepSpeed ZeRO-3 leaves them where "
        "each process has a part. The model is not to blame.",
        "Run zero_to_fp32.py in the folder that training saved; this file has no weights.",
        "RuntimeError: Error(s) in loading state_dict for Net: size mismatch for fc.weight: "
        "copying a param with shape torch.Size([0]) from checkpoint, the shape in current model is "
        "torch.Size([10, 512]).",
    ),
    Known(
        "model-partitioned",
        ("the shape in current model is torch.Size([0])",),
        "The model is empty, as DeepSpeed ZeRO-3 makes it; the file is not to blame.",
        "Load the weights before deepspeed.initialize, or inside of "
        "deepspeed.zero.GatheredParameters.",
        "RuntimeError: Error(s) in loading state_dict for Net: size mismatch for fc.weight: "
        "copying a param with shape torch.Size([10, 512]) from checkpoint, the shape in current "
        "model is torch.Size([0]).",
    ),
    Known(
        "quantized-by-bitsandbytes",
        (
            "Only Tensors of floating point and complex dtype can require gradients",
            ".SCB'",
            "quant_state.bitsandbytes__",
            "`bnb.nn.Params4bit`",
        ),
        "The weights are quantized: only a model that is quantized in the same way takes them.",
        "Build the model with the quantization of its config.json, or take the original weights.",
        "RuntimeError: Only Tensors of floating point and complex dtype can require gradients",
    ),
    Known(
        "copy-to-meta",
        ("no-op. (Did you mean to pass `assign=True`", "is a meta parameter, which is a no-op"),
        "The model has no memory yet (it was built on the meta device), so nothing was loaded. "
        "The file is not to blame.",
        "Pass assign=True to load_state_dict, or call model.to_empty(device='cpu') before it.",
        "UserWarning: for 0.weight: copying from a non-meta parameter in the checkpoint to a meta "
        "parameter in the current model, which is a no-op. (Did you mean to pass `assign=True` to "
        "assign items in the state dictionary to their corresponding key in the module instead of "
        "copying them in place?)",
    ),
    Known(
        "meta-tensors",
        ("Cannot copy out of meta tensor; no data!", "Cannot copy out of meta tensor"),
        "Tensors have no data: the file was saved while weights were offloaded, or the model was "
        "built on the meta device and some weights were not loaded.",
        command("inspect", "FILE"),
        "NotImplementedError: Cannot copy out of meta tensor; no data! Please use "
        "torch.nn.Module.to_empty() instead of torch.nn.Module.to() when moving module from meta "
        "to a different device.",
    ),
    Known(
        "kind-differs",
        ("While copying the parameter named … whose dimensions … an exception occurred",),
        "A value could not be copied into the model: it is no dense tensor (quantized, sparse, "
        "sharded, a list), or is of another kind than the model's. What follows `an exception "
        "occurred` in the text is the cause.",
        _CHECK,
        'RuntimeError: While copying the parameter named "w"'
        ", whose dimensions in the model are torch.Size([2]) and whose dimensions in the "
        "checkpoint are torch.Size([2]), an exception occurred : ('Copying from quantized Tensor "
        "to non-quantized Tensor is not allowed, please use dequantize to get a float Tensor from "
        "a quantized Tensor',).",
    ),
    Known(
        "value-not-a-tensor",
        (
            "expected torch.Tensor or Tensor-like object from checkpoint but received",
            "While copying the parameter named … expected torch.Tensor",
        ),
        "An entry of the state dict is no tensor (a numpy array, a list, a whole state dict).",
        _FIX,
        'RuntimeError: While copying the parameter named "w"'
        ", expected torch.Tensor or Tensor-like object from checkpoint but received <class "
        "'numpy.ndarray'>",
    ),
    Known(
        "shape-mismatch",
        (
            "size mismatch for …: copying a param",
            "size mismatch for …, torch.Size(",
            "While copying the parameter named",
            "ignore_mismatched_sizes",
            "Skip loading parameter … due to incompatible shapes",
            "Shape of … in checkpoint is …, while shape of … in model is",
            "Size mismatch between saved … and current",
            "| MISMATCH |",
            "because … expected shape … but got",
            "Trying to set a tensor of shape …",
            "shapes do not match",
            "Mismatch between checkpoint and model shapes",
            "has a shape mismatch",
        ),
        "A tensor has another shape than the model's: another number of classes, another size of "
        "vocabulary, or another configuration of the model.",
        _CHECK,
        "RuntimeError: Error(s) in loading state_dict for Net: size mismatch for fc.weight: "
        "copying a param with shape torch.Size([1000, 512]) from checkpoint, the shape in current "
        "model is torch.Size([10, 512]).",
    ),
    Known(
        "uninitialized-model",
        (
            "Attempted to use an uninitialized parameter",
            "Can't access the shape of an uninitialized parameter",
        ),
        "The model has lazy layers that were never run. The file is not to blame.",
        "Run the model once on an input of the right shape, then load.",
        "ValueError: Attempted to use an uninitialized parameter in <method 'numel' of "
        "'torch._C.TensorBase' objects>. This error happens when you are using a `LazyModule` or "
        "explicitly manipulating `torch.nn.parameter.UninitializedParameter` objects.",
    ),
    Known(
        "adapter-keys",
        ("Found missing adapter keys while loading the checkpoint",),
        "The keys of the adapter are not those of the model that it is put on: it was made for "
        "another model, or saved from one that was wrapped (`module.`, `_orig_mod.`).",
        command("inspect", "FILE"),
        "UserWarning: Found missing adapter keys while loading the checkpoint: "
        "['base_model.model.layers.0.q_proj.lora_A.default.weight'].",
    ),
    Known(
        "lora-keys",
        (),
        "The keys are those of a LoRA adapter (`lora_A`, `lora_B`): a small file that belongs to "
        "a model, or a model that it was not merged into.",
        command("inspect", "FILE"),
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"fc.weight". Unexpected key(s) in state_dict: "base_model.model.fc.lora_A.weight", '
        '"base_model.model.fc.lora_B.weight".',
    ),
    Known(
        "quantized-keys",
        (),
        "The weights are quantized and packed (scales, zero points): only a model that is "
        "quantized in the same way takes them.",
        "Build the model with the quantization that its configuration names, or take the original "
        "weights.",
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"fc.weight". Unexpected key(s) in state_dict: "fc.qweight", "fc.scales", "fc.qzeros".',
    ),
    Known(
        "changed-names",
        (),
        "The same weights under the names that weight norm, pruning or an old BERT give them.",
        _FIX,
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1". '
        'Unexpected key(s) in state_dict: "conv.weight_g", "conv.weight_v".',
    ),
    Known(
        "leftover-keys",
        (),
        "The keys that the model does not have are no weights, but what programs left behind: "
        "`position_ids` and `inv_freq` of older transformers, `num_batches_tracked`, "
        "`total_ops` and `total_params` of thop. Nothing is lost without them.",
        _FIX,
        "RuntimeError: Error(s) in loading state_dict for BertModel: Unexpected key(s) in "
        'state_dict: "embeddings.position_ids".',
    ),
    Known(
        "missing-counters",
        (),
        "Only counters and constants are missing that the model makes itself "
        "(`num_batches_tracked`, `position_ids`), and no weights.",
        "Pass strict=False to load_state_dict, and check that it returns no other missing key.",
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"bn1.num_batches_tracked", "bn2.num_batches_tracked".',
    ),
    Known(
        "missing-counter",
        ("KeyError: '….num_batches_tracked'", 'KeyError: "….num_batches_tracked"'),
        "The checkpoint was saved before torch 0.4.1, which has no such counters; its weights are "
        "whole.",
        "Leave out the counter where your program asks for it: it is not used unless momentum is "
        "None.",
        "KeyError: 'layer1.0.bn1.num_batches_tracked'",
    ),
    Known(
        "running-stats",
        ("Unexpected running stats buffer(s)",),
        "The checkpoint has running means and variances of InstanceNorm from torch before 0.4, "
        "where it did not use them; the model has track_running_stats=False.",
        command("fix", "FILE", "OUT", drop=("*running_mean", "*running_var")),
        "RuntimeError: Error(s) in loading state_dict for InstanceNorm2d: Unexpected running stats "
        'buffer(s) "running_mean" and "running_var" for InstanceNorm2d with '
        "track_running_stats=False.",
    ),
    Known(
        "another-head",
        (),
        "Only the last layer differs: the checkpoint was trained for another task, or for another "
        "number of classes.",
        _CHECK,
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"classifier.weight", "classifier.bias". Unexpected key(s) in state_dict: "fc.weight", '
        '"fc.bias".',
    ),
    Known(
        "no-target-names",
        (
            "There is no module or parameter named",
            "weights were not initialized from checkpoint",
            "not found in the model: KeyError",
            "No valid parameters found in the checkpoint",
            "An unexpected key, … exists. FQN is",
            "Cannot load model parameters from checkpoint",
            "please ensure that the architectures match",
            "Missing key in checkpoint state_dict:",
        ),
        "The names in the checkpoint are not those of the model.",
        command("inspect", "FILE"),
        "ValueError: There is no module or parameter named 'model.visual' in LlamaForCausalLM",
    ),
    Known(
        "keys-differ",
        (
            "key(s) in state_dict",
            "keys in state_dict",
            "missing key in state_dict",
            'unexpected key "',
            "were not used when initializing",
            "not initialized from the model checkpoint",
            "unexpected keys in the checkpoint model loaded",
            "missing keys in the checkpoint model loaded",
            "keys that are not used by the model",
            "buffers are not found in the checkpoint",
            "LOAD REPORT … | UNEXPECTED",
            "LOAD REPORT … | MISSING",
            "_IncompatibleKeys(",
            "following keys are missing:",
        ),
        "The names in the checkpoint are not those of the model.",
        _FIX,
        "RuntimeError: Error(s) in loading state_dict for Net: Missing key(s) in state_dict: "
        '"head.weight".',
    ),
)
