"""Checkpoints that were saved on a device that is not here."""

from __future__ import annotations

from ckptfix.hints import command
from ckptfix.known_errors.known import Known

_TO_CPU = command("to-cpu", "FILE", "OUT")

ROWS = (
    Known(
        "device-cuda",
        ("Attempting to deserialize object on a CUDA device but torch.cuda.is_available()",),
        "The checkpoint was saved from a GPU, and this machine has none.",
        _TO_CPU,
        "RuntimeError: Attempting to deserialize object on a CUDA device but "
        "torch.cuda.is_available() is False.",
    ),
    Known(
        "device-index",
        (
            "Attempting to deserialize object on … device … but torch.….device_count() is",
            "invalid device ordinal",
        ),
        "The checkpoint was saved from a GPU whose number this machine does not have.",
        _TO_CPU,
        "RuntimeError: Attempting to deserialize object on CUDA device 3 but "
        "torch.cuda.device_count() is 1.",
    ),
    Known(
        "device-other",
        (
            "don't know how to restore data location of",
            "Attempting to deserialize object on a",
            "device module is not registered. If you are running on a CPU-only machine",
        ),
        "The checkpoint was saved from a kind of device that this torch does not know.",
        _TO_CPU,
        "RuntimeError: don't know how to restore data location of torch.storage.UntypedStorage "
        "(tagged with npu:0)",
    ),
    Known(
        "device-rebuilt",
        (
            "_rebuild_xla_tensor",
            "_rebuild_device_tensor_from_numpy",
            "Could not run 'aten::empty.memory_format' with arguments from the 'XLA' backend",
            "No module named 'torch_xla'",
            "No module named 'torch_npu'",
            "No module named 'torch_mlu'",
            "No module named 'habana_frameworks'",
        ),
        "The tensors were saved from a device whose package is not here (a TPU, an NPU).",
        _TO_CPU,
        "ModuleNotFoundError: No module named 'torch_xla'",
    ),
    Known(
        "device-mps-float64",
        ("Cannot convert a MPS Tensor to float64 dtype",),
        "The file holds float64 tensors, which Apple's GPU does not have.",
        command("convert", "FILE", "OUT", dtype="float32"),
        "TypeError: Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
        "support float64. Please use float32 instead.",
    ),
)
