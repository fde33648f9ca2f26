"""Sound files that are used as what they are not: a state dict as a model, a model as a dict."""

from __future__ import annotations

from ckptfix.hints import command
from ckptfix.known_errors.known import Known

_INSPECT = command("inspect", "FILE")
_WEIGHTS = command("convert", "FILE", "OUT", weights_only=True)

ROWS = (
    Known(
        "path-not-loaded",
        (
            "xpected state_dict to be dict-like, got <class 'str'>",
            "xpected state_dict to be dict-like, got <class 'pathlib",
            "'str' object has no attribute 'copy'",
            "'PosixPath' object has no attribute 'copy'",
        ),
        "load_state_dict was given a path, not what is in the file.",
        "Load it first: model.load_state_dict(torch.load(FILE, map_location='cpu')).",
        "TypeError: Expected state_dict to be dict-like, got <class 'str'>.",
    ),
    Known(
        "saved-object",
        (
            "xpected state_dict to be dict-like, got <class 'method'>",
            "xpected state_dict to be dict-like, got <class 'type'>",
            "xpected state_dict to be dict-like, got <class 'builtin_function",
            "xpected state_dict to be dict-like, got <class 'NoneType'>",
            "xpected state_dict to be dict-like, got <class OrderedDict>",
            "'method' object has no attribute 'copy'",
        ),
        "What was saved, or given, is a method or nothing at all: `state_dict` without its "
        "parentheses. There may be no weights in the file.",
        _INSPECT,
        "TypeError: Expected state_dict to be dict-like, got <class 'method'>.",
    ),
    Known(
        "dict-of-numpy",
        (
            "xpected state_dict to be dict-like, got <class 'numpy",
            "xpected state_dict to be dict-like, got <class 'list'>",
            "xpected state_dict to be dict-like, got <class 'tuple'>",
            "xpected state_dict to be dict-like, got <class 'torch.Tensor'>",
            "'tuple' object has no attribute 'copy'",
            "'Tensor' object has no attribute 'copy'",
        ),
        "The file holds a list, a tuple, an array or one tensor, in which the state dict may be an "
        "entry.",
        _INSPECT,
        "TypeError: Expected state_dict to be dict-like, got <class 'tuple'>.",
    ),
    Known(
        "not-a-state-dict",
        (
            "xpected state_dict to be dict-like, got",
            "object has no attribute 'copy'",
        ),
        "The file holds a whole model; its state dict can be taken out of it.",
        _WEIGHTS,
        "TypeError: Expected state_dict to be dict-like, got "
        "<class 'torch.nn.modules.linear.Linear'>.",
    ),
    Known(
        "wrapped-in-data-parallel",
        (
            "'DataParallel' object has no attribute '",
            "'DistributedDataParallel' object has no attribute '",
            "'OptimizedModule' object has no attribute '",
        ),
        "The model is wrapped; what it was before is its attribute `module` (or `_orig_mod`). A "
        "checkpoint of the wrapped model has that before every key.",
        "Use model.module in the program; save model.module.state_dict() from now on, and "
        "ckptfix strip-prefix FILE OUT takes it off an old file.",
        "AttributeError: 'DataParallel' object has no attribute 'save_pretrained'",
    ),
    Known(
        "not-a-model",
        (
            "OrderedDict' object has no attribute '",
            "'OrderedDict' object is not callable",
            "'collections.OrderedDict' object is not callable",
            "'dict' object is not callable",
            "'dict' object has no attribute 'eval'",
            "'dict' object has no attribute 'to'",
            "'dict' object has no attribute 'cuda'",
            "'dict' object has no attribute 'cpu'",
            "'dict' object has no attribute 'state_dict'",
            "'dict' object has no attribute 'load_state_dict'",
            "'dict' object has no attribute 'parameters'",
            "'dict' object has no attribute 'train'",
            "'dict' object has no attribute 'forward'",
            "'dict' object has no attribute 'seek'",
        ),
        "The file holds a state dict, not a model: build the model, then load_state_dict.",
        command("check", "FILE", model="M"),
        "AttributeError: 'collections.OrderedDict' object has no attribute 'eval'",
    ),
    Known(
        "seek-on-stream",
        (
            "has no attribute 'seek'. You can only torch.load from a file that is seekable",
            "You can only torch.load from a file that is seekable",
            "seek() takes … argument",
            "underlying stream is not seekable",
        ),
        "torch.load was given a stream that cannot go back, as of a download or an archive.",
        "Read it first: torch.load(io.BytesIO(stream.read())).",
        "AttributeError: 'HTTPResponse' object has no attribute 'seek'. You can only torch.load "
        "from a file that is seekable.",
    ),
    Known(
        "entry-absent",
        (
            "KeyError: 'state_dict'",
            "KeyError: 'model'",
            "KeyError: 'model_state_dict'",
            "KeyError: 'net'",
            "KeyError: 'optimizer'",
            "KeyError: 'optimizer_state_dict'",
            "KeyError: 'epoch'",
            "KeyError: 'model_state'",
            "KeyError: 'weights'",
            "KeyError: 'ema'",
            "KeyError: 'generator'",
            "KeyError: 'cfg'",
            "KeyError: 'args'",
            "KeyError: 'hyper_parameters'",
            "KeyError: 'network_fn_state_dict'",
        ),
        "The program asks the file for an entry that it does not have: it may be the state dict "
        "itself, or keep it under another name.",
        _INSPECT,
        "KeyError: 'state_dict'",
    ),
    Known(
        "optimizer-groups",
        (
            "loaded state dict contains a parameter group that doesn't match",
            "loaded state dict has a different number",
            "Expected … param groups",
        ),
        "The optimizer was saved for another set of parameters than the model has now.",
        _INSPECT,
        "ValueError: loaded state dict contains a parameter group that doesn't match the size of "
        "optimizer's group",
    ),
    Known(
        "key-asked-for",
        ("KeyError: '….weight'", "KeyError: '….bias'", 'KeyError: "….weight"'),
        "The program asks the state dict for a key that it does not have, or has under another "
        "name.",
        _INSPECT,
        "KeyError: 'model.diffusion_model.input_blocks.0.0.weight'",
    ),
)
