"""What fails while a checkpoint is saved: advice for the program that saves it."""

from __future__ import annotations

from ckptfix.hints import command
from ckptfix.known_errors.known import Known

ROWS = (
    Known(
        "shared-memory",
        (
            "Some tensors share memory, this will lead to duplicate memory on disk",
            "The weights trying to be saved contained shared tensors",
            "removed shared tensor … while saving",
        ),
        "The model has tied tensors, which safetensors' save_file does not write. The file was not "
        "written yet.",
        "In the program that saves: safetensors.torch.save_model(model, FILE), or torch.save and "
        "then ckptfix convert FILE.pt OUT.safetensors, which writes each once.",
        "RuntimeError: Some tensors share memory, this will lead to duplicate memory on disk and "
        "potential differences when loading them again: [{'embed.weight', 'lm_head.weight'}].",
    ),
    Known(
        "non-contiguous",
        ("You are trying to save a non contiguous tensor",),
        "A tensor is transposed or a view, which safetensors' save_file does not write. The file "
        "was not written yet.",
        "In the program that saves: {k: v.contiguous() for k, v in state_dict.items()}, or "
        "torch.save and then ckptfix convert FILE.pt OUT.safetensors.",
        "ValueError: You are trying to save a non contiguous tensor: `w` which is not allowed.",
    ),
    Known(
        "cannot-pickle",
        (
            "Can't pickle local object",
            "Can't get local object",
            "cannot pickle '",
            "can't pickle ",
            "Can't pickle <",
            "PicklingError:",
        ),
        "torch.save was given an object that cannot be pickled: a function inside of a function, a "
        "lambda, a lock, a module. The file was not written, or not whole.",
        "Save model.state_dict() in its place.",
        "AttributeError: Can't pickle local object 'main.<locals>.<lambda>'",
    ),
    Known(
        "only-tensors-in-safetensors",
        ("Expected a dict of [str, torch.Tensor] but received", "Key `…` is invalid, expected"),
        "safetensors holds tensors by name, and nothing else: no nested dict, no number.",
        "Save model.state_dict(); a training checkpoint stays with torch.save.",
        "ValueError: Expected a dict of [str, torch.Tensor] but received <class 'list'>",
    ),
    Known(
        "save-folder-missing",
        ("Parent directory … does not exist",),
        "torch.save does not make the folder that the file is to lie in.",
        "Make it first: os.makedirs(folder, exist_ok=True).",
        "RuntimeError: Parent directory checkpoints does not exist.",
    ),
    Known(
        "write-failed",
        (
            "unexpected pos … vs",
            "PytorchStreamWriter failed writing",
            "No space left on device",
            "Disk quota exceeded",
            "I/O error: No space",
        ),
        "torch.save could not write everything, mostly because the disk was full; what it left is "
        "no checkpoint.",
        command("check", "FILE"),
        "RuntimeError: [enforce fail at inline_container.cc:603] . unexpected pos 320 vs 214",
    ),
)
