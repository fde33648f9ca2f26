"""Models that are named on the command line: found, imported and built.

Building a model runs its code: that is the user's own code, or that of an installed package, named
by the user, never anything from a checkpoint.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from contextlib import redirect_stdout
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix.bytes.place import Place
from ckptfix.errors import TargetError
from ckptfix.hints import Command, Hint, naming, shell
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import nn


class WantsValuesError(TargetError):
    """A model that was called as it wants, and whose code failed on the meta device."""


def of_reference(reference: str, init: str | None = None) -> Callable[[str], nn.Module]:
    """What builds, on a device, the model that a reference names.

    `FILE.py:NAME` and `package.module:NAME` name an `nn.Module` class, a function that returns a
    model, or a model; the current folder can be imported from. `hf:FOLDER` names a model of
    transformers by the `config.json` in a folder. `init` is JSON: an object gives keyword
    arguments, an array positional ones. Both this and what it returns raise `TargetError`.

    Example:
        >>> of_reference("torch.nn:Linear", "[2, 3]")("meta")
        Linear(in_features=2, out_features=3, bias=True)

    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise TargetError(
            "is not of the form FILE.py:NAME or package.module:NAME",
            where=f"--model {reference}",
            hint=naming("for example", "model", "models/foonet.py:FooNet"),
        )
    arguments = _Arguments.of(init)
    if reference.startswith(_HF):
        found: Any = _of_transformers(reference.removeprefix(_HF), reference)
    else:
        found = _attribute(_import(where, reference), name, reference)
    return lambda device: _build(found, arguments, reference, device)


class _Arguments(NamedTuple):
    """What a model is built with."""

    positional: list[Any]
    keywords: dict[str, Any]

    @classmethod
    def of(cls, init: str | None) -> _Arguments:
        try:
            given = json.loads(init) if init else {}
        except ValueError as error:
            raise TargetError(
                f"is not JSON ({error})", where=f"--init {init}", hint=_EXAMPLE
            ) from None
        if isinstance(given, dict):
            return cls([], given)
        if isinstance(given, list):
            return cls(given, {})
        raise TargetError(
            "is neither a JSON object nor an array", where=f"--init {init}", hint=_EXAMPLE
        )

    def __str__(self) -> str:
        """As they stand in a call."""
        named = [f"{name}={value!r}" for name, value in self.keywords.items()]
        return ", ".join([*map(repr, self.positional), *named])


_EXAMPLE = naming("for example", "init", '{"layers": 3}')


# Finding


def _import(where: str, reference: str) -> ModuleType:
    folders = [Place(".").resolved]
    if _is_file(where):
        folders.append(Place(where).folder.resolved)
    for folder in folders:
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):
            return _import_file(where) if _is_file(where) else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        place = Place(where)
        absent = _is_file(where) and not place.is_file
        see = Hint("see what is there", shell("ls", files=[place.folder.name]))
        raise TargetError(
            f"cannot be imported: {_describe(error)}",
            where=f"--model {reference}",
            hint=see if absent else Hint("try it", _try(where)),
        ) from error


def _try(where: str) -> Command:
    if _is_file(where):
        return shell(_python(), files=[where])
    return shell(_python(), "-c", f"import {where}")


def _python() -> str:
    return sys.executable


def _is_file(where: str) -> bool:
    return where.endswith(".py")


def _import_file(where: str) -> ModuleType:
    name = PurePath(where).stem
    if not Place(where).is_file:
        raise FileNotFoundError(f"there is no file {where}")
    spec = importlib.util.spec_from_file_location(name, where)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, name: str, reference: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        hint = f"it defines {listed(_models(module), 8) or 'no class and no function'}"
        raise TargetError(f"there is no {name!r} in it", where=f"--model {reference}", hint=hint)
    return found


def _models(module: ModuleType) -> list[str]:
    """What a module defines that may be, or give, a model: classes first, then functions."""
    own = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    classes = [name for name, value in own.items() if inspect.isclass(value)]
    return classes + [name for name, value in own.items() if inspect.isfunction(value)]


_HF = "hf:"


def _of_transformers(folder: str, reference: str) -> Callable[..., nn.Module]:
    """What builds the model of a `config.json`, without its weights and without code from there."""
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"needs transformers, which cannot be imported: {_describe(error)}",
            where=f"--model {reference}",
            hint=Hint("install it", shell("pip", "install", "transformers")),
        ) from error
    if not Place(folder).below("config.json").is_file:
        raise TargetError(
            f"there is no config.json in {folder}",
            where=f"--model {reference}",
            hint=Hint("see what is there", shell("ls", files=[folder])),
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise TargetError(
            f"its config.json cannot be read: {_describe(error)}",
            where=f"--model {reference}",
            hint="name the class of the model instead: --model package.module:NAME",
        ) from error
    name = next(iter(config.architectures or ()), None)
    found = getattr(transformers, name, None) if name else transformers.AutoModel
    if found is None:
        raise TargetError(
            f"its config.json names {name}, which transformers {transformers.__version__} lacks",
            where=f"--model {reference}",
            hint="name the class of the model instead: --model package.module:NAME",
        )
    make = found.from_config if found is transformers.AutoModel else found
    return lambda *arguments, **keywords: make(config, *arguments, **keywords)


# Building


def _build(found: Any, arguments: _Arguments, reference: str, device: str) -> nn.Module:
    import torch

    from ckptfix.torch_bridge.quantizing import no_quantizing

    try:
        with torch.device(device), no_quantizing(device), redirect_stdout(sys.stderr):
            model = (
                found
                if isinstance(found, torch.nn.Module)
                else found(*arguments.positional, **arguments.keywords)
            )
    except (Exception, SystemExit) as error:
        advice, is_called_right = _advice(found, arguments, reference, error)
        kind = WantsValuesError if device == "meta" and is_called_right else TargetError
        raise kind(
            f"cannot be built: {_describe(error)}", where=f"--model {reference}", hint=advice
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise TargetError(
            f"gives a value of type {type(model).__name__}, which is not an nn.Module",
            where=f"--model {reference}",
            hint="name an nn.Module class, a function that returns a model, or a model",
        )
    return model


def _advice(
    found: Any, arguments: _Arguments, reference: str, error: BaseException
) -> tuple[Hint | str, bool]:
    """What to do about a model that cannot be built, and whether it was called as it wants."""
    where, _, name = reference.rpartition(":")
    if not callable(found):
        return "name an nn.Module class, a function that returns a model, or a model", False
    if inspect.isabstract(found):
        return f"name a class that can be built: {name} is abstract", False
    if isinstance(error, FileNotFoundError) and error.filename:
        return (
            f"its code opens {error.filename}: run ckptfix in the folder where that is found",
            False,
        )
    lacking = _lacking(found, arguments)
    if lacking is None:
        return Hint("try it", _call(where, name, arguments)), isinstance(error, Exception)
    objects = [parameter.name for parameter in lacking if _is_object(parameter)]
    if objects:
        write = (
            f"write a function that makes {listed(objects)} and returns the model, and name that"
        )
        return naming(write, "model", "FILE.py:FUNCTION"), False
    names = {parameter.name: "value" for parameter in lacking}
    known = {name: json.dumps(value) for name, value in arguments.keywords.items()}
    pairs = ", ".join(f'"{name}": {value}' for name, value in (known | names).items())
    return naming("give its arguments as JSON", "init", f"{{{pairs}}}"), False


def _lacking(found: Any, arguments: _Arguments) -> list[inspect.Parameter] | None:
    """The arguments that a call needs besides those given; None: it was called as it wants.

    Where it was given one that it does not take, all that it takes.
    """
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*arguments.positional, **arguments.keywords)
    except TypeError:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [each for each in signature.parameters.values() if each.kind not in kinds]
        rest = named[len(arguments.positional) :]
        wanted = [
            each
            for each in rest
            if each.default is inspect.Parameter.empty and each.name not in arguments.keywords
        ]
        return wanted or named
    return None


def _is_object(parameter: inspect.Parameter) -> bool:
    """Whether an argument is something that JSON does not give, such as a configuration."""
    if parameter.name in _CONFIGURATIONS:
        return True
    kind = parameter.annotation
    return inspect.isclass(kind) and kind.__module__ != "builtins" and kind is not parameter.empty


_CONFIGURATIONS = frozenset({"config", "cfg", "args", "opt", "opts", "conf", "hparams", "hps"})


def _call(where: str, name: str, arguments: _Arguments) -> Command:
    """A command that builds it with all that Python has to say of a failure."""
    if f"{where}:" == _HF:
        code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({name!r})"
    elif _is_file(where):
        code = f"import runpy; runpy.run_path({where!r})[{name!r}]({arguments})"
    else:
        code = f"import {where}; {where}.{name}({arguments})"
    return shell(_python(), "-c", code)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
