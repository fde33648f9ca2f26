"""Errors that are not about a file, and say so here: no checkpoint needs to be repaired."""

from __future__ import annotations

from ckptfix.known_errors.known import Known

_NOT = "This is not about the checkpoint. "

ROWS = (
    Known(
        "gpu-memory",
        (
            "CUDA out of memory",
            "MPS backend out of memory",
            "HIP out of memory",
            "XPU out of memory",
            "torch.OutOfMemoryError",
            "CUBLAS_STATUS_ALLOC_FAILED",
        ),
        f"{_NOT}The GPU has too little memory.",
        "Load with map_location='cpu' and move the model once; take smaller batches, or a smaller "
        "dtype (ckptfix convert FILE OUT --dtype bf16).",
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; "
        "10.76 GiB total capacity)",
    ),
    Known(
        "memory",
        (
            "DefaultCPUAllocator: can't allocate memory",
            "DefaultCPUAllocator: not enough memory",
            "not enough memory: you tried to allocate",
            "Cannot allocate memory (12)",
            "MemoryError",
            "paging file is too small",
            "os error 1455",
            "unable to mmap … bytes from file",
        ),
        "This machine has too little memory for the program; the file is not to blame.",
        "Load with torch.load(FILE, mmap=True), or with ckptfix.load_into, which maps the file; "
        "on Windows, enlarge the paging file.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough "
        "memory: you tried to allocate 4194304000 bytes.",
    ),
    Known(
        "two-devices",
        (
            "Expected all tensors to be on the same device",
            "should be the same as weight type (torch.FloatTensor)",
            "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor)",
            "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor)",
            "is not on the expected device",
            "module must have its parameters and buffers on device",
        ),
        f"{_NOT}The model is on one device and its input on another.",
        "Move both to one: model.to(device), x.to(device).",
        "RuntimeError: Expected all tensors to be on the same device, but found at least two "
        "devices, cuda:0 and cpu!",
    ),
    Known(
        "dtype-in-kernel",
        (
            "not implemented for 'Half'",
            "not implemented for 'BFloat16'",
            "not implemented for 'Float8",
            "expected scalar type",
            "must have the same dtype",
            "expected m1 and m2 to have the same dtype",
            "and bias type (",
        ),
        f"{_NOT}An operation does not take the dtype of the model, or of its input.",
        "Call model.float(), or give the input the dtype of the model.",
        "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'",
    ),
    Known(
        "numpy-bfloat16",
        ("Got unsupported ScalarType BFloat16", "data type 'bfloat16' not understood"),
        f"{_NOT}numpy has no bfloat16.",
        "Call .float() on the tensor before .numpy().",
        "TypeError: Got unsupported ScalarType BFloat16",
    ),
    Known(
        "kernel-failed",
        (
            "device-side assert triggered",
            "no kernel image is available for execution on the device",
            "an illegal memory access was encountered",
            "CUDNN_STATUS_",
            "CUBLAS_STATUS_",
            "Torch not compiled with CUDA enabled",
            "Found no NVIDIA driver on your system",
            "CUDA driver version is insufficient",
            "NCCL error",
            "NCCL timeout",
        ),
        f"{_NOT}The GPU, its driver, or the build of torch is what fails.",
        "Run it with CUDA_LAUNCH_BLOCKING=1 and look at that line; for a build, see "
        "torch.version.cuda and nvidia-smi.",
        "RuntimeError: CUDA error: device-side assert triggered",
    ),
    Known(
        "shapes-in-forward",
        (
            "mat1 and mat2 shapes cannot be multiplied",
            "size mismatch, m1:",
            "Given groups=",
            "must match the size of tensor b",
            "index out of range in self",
            "Expected more than 1 value per channel when training",
        ),
        f"{_NOT}The model was given an input of another shape than it is made for.",
        "Look at the shape of the input, and at the configuration of the model.",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x512 and 256x10)",
    ),
    Known(
        "no-such-file",
        (
            "FileNotFoundError: [Errno 2] No such file or directory",
            "No such file or directory (os error 2)",
            "does not exist or is not a file",
            "FileNotFoundError: No such file",
        ),
        "There is no file of that name, seen from the folder in which the program was started.",
        "Give the whole path, and compare its letters, upper and lower case, with those of `ls`.",
        "FileNotFoundError: [Errno 2] No such file or directory: 'checkpoints/best.pt'",
    ),
    Known(
        "is-a-folder",
        ("IsADirectoryError: [Errno 21]", "Is a directory (os error 21)"),
        "The path is that of a folder, not of a file.",
        "Give the file in it; ckptfix takes the folder too: ckptfix inspect FOLDER.",
        "IsADirectoryError: [Errno 21] Is a directory: 'checkpoints/step_500'",
    ),
    Known(
        "no-permission",
        ("PermissionError: [Errno 13]", "Permission denied (os error 13)"),
        "The system does not let this user read or write the file, or on Windows it is a folder "
        "or open elsewhere.",
        "Look at its owner and its rights with `ls -l`.",
        "PermissionError: [Errno 13] Permission denied: 'model.pt'",
    ),
    Known(
        "download-failed",
        (
            "HTTP Error 4",
            "HTTP Error 5",
            "Client Error: Not Found for url",
            "Client Error: Unauthorized for url",
            "Client Error: Forbidden for url",
            "GatedRepoError",
            "RepositoryNotFoundError",
            "is not a valid model identifier",
            "Connection error, and we cannot find the requested files",
            "urlopen error",
            "Max retries exceeded with url",
            "ConsistencyError",
            "invalid hash value (expected",
        ),
        "The file was not downloaded, or not whole.",
        "Remove what the download left in the cache, log in if the page wants it, and download "
        "again.",
        "urllib.error.HTTPError: HTTP Error 403: Forbidden",
    ),
)
