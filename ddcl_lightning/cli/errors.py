"""Errors for people: which key is wrong and the nearest valid one, and which errors need no traceback."""

import difflib
import dis
import errno
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback

import ddcl_lightning
from ddcl_lightning import datamodules
from ddcl_lightning._utils.arguments import is_memory_short, nearest
from ddcl_lightning._utils.distributed import is_lost_process
from ddcl_lightning._utils.old_names import renamed_argument
from ddcl_lightning.backbones import Backbone
from ddcl_lightning.checkpoints.reading import cannot_be_restored, other_model
from ddcl_lightning.cli.output_files import WRITERS, events_unwritten
from ddcl_lightning.cli.wrong_values import (
    find_class,
    innermost_key,
    missing_class,
    missing_init,
    missing_value,
    wrong_value,
)
from ddcl_lightning.decoders import Decoder
from ddcl_lightning.heads import Head
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.monitoring import Signal
from ddcl_lightning.nn import Quantizer
from ddcl_lightning.tasks import Task

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|[Uu]nrecognized arguments?:?) '?-{0,2}([\w.-]+)")
_UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"Parser key \"([\w.]+)\".*?dot import path string: ([\w.]+)", re.DOTALL)
_UNKNOWN_COMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)' \(choose from (.*)\)")
_NO_COMMAND = re.compile(r'expected "subcommand" to be one of \{(.*?)\}')
_NO_VALUE = re.compile(r"argument (?:-\w/)?(--[\w.]+): expected one argument")
_TOO_EARLY = re.compile(r"Option '([^']*)' is not accepted before subcommand '(\w+)'")
# A class that refuses an argument is reported as one failed alternative of several.
_ALTERNATIVE = "\n  - Not a valid subclass of "
_ALTERNATIVES = re.compile(r"^\s+- (.*)$", re.MULTILINE)
_OF_PARSER = (
    "Does not validate",
    "Expected a",
    "Not a valid subclass",
    "Problem with",
    "Parser key",
    "Import path",
    "a class path",
    "a dict",
)
_KEY_OF_NO_TEXT = re.compile(r"Key must be a string, got: (.+)\.$")
# What argument and data checks raise.
CHECKED = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
# ... and what checks raise during the run: a backbone that is not fitted, a collapse, a loss that is not finite, a
# data module that is not set up.
_CHECKED_IN_RUN = (*CHECKED, RuntimeError, FloatingPointError, AttributeError)
_REFUSED_BY_LIGHTNING = (ValueError, MisconfigurationException, FileNotFoundError)
# ... and where it raises plain RuntimeErrors for callbacks that cannot work as they are set.
_CALLBACKS = ("lightning.pytorch.callbacks", "lightning.pytorch.trainer.connectors.callback_connector")
# Refusals of Lightning whose remedy is an argument of ours.
_REMEDIES = {
    r"gradient clipping is not supported": "gradient_clip_val belongs to the model here, which steps two optimizers: "
    "use --model.gradient_clip_val.",
    r"gradient accumulation is not supported": "accumulate_grad_batches belongs to the model here, which steps two "
    "optimizers: use --model.accumulate_grad_batches.",
    r"[Nn]o supported gpu backend|Accelerator` can not run|available accelerator|requested gpu|torch_xla": "the "
    "accelerator asked for is not on this machine: use --trainer.accelerator auto, or cpu.",
}
_UNWRITABLE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EDQUOT, errno.EFBIG}
_PACKAGE = __name__.partition(".")[0]
# Code that only passes control on: an error below it is not its doing. Everybody else's is worth a traceback.
_CARRIERS = {_PACKAGE, "lightning", "lightning_utilities", "torch", "jsonargparse", "tqdm", *sys.stdlib_module_names}
_RESTORES = ".connectors.checkpoint_connector"
_SAME_STATE = re.compile(r"Found more than one stateful callback of type `(\w+)`")
_BASES: dict[str, type] = {
    "model.backbone": Backbone,
    "model.head": Head,
    "model.task": Task,
    "data": LightningDataModule,
    # Arguments of those.
    "additional": Signal,
    "decoder": Decoder,
    "quantizer": Quantizer,
}


def explain(message: str, parser: ArgumentParser) -> str:
    """A parser's message, headed by a line that names the unknown key or class and the nearest valid one."""
    refused = next((match.groups() for match in _UNKNOWN_ARGUMENT.finditer(message) if not _is_any(match[1])), None)
    if refused:
        path, key = refused
        owner = find_class(path)
        renamed = owner and renamed_argument(owner, [key.partition(".")[0]], called=path, as_yaml=True)
        known = list(inspect.signature(owner).parameters) if owner else []
        return renamed or f"unknown argument {key!r} of {path}{nearest(key, known)}"
    match = _UNKNOWN_ARGUMENT.search(message)
    if match and find_class(match[1]) is Callback and message.count("Parser key") == 1:
        return f"unknown argument {match[2]!r}: no class has been named that could take it. Name the class before it."
    match = _UNKNOWN_OPTION.search(message)
    if match:
        key = match.group(1)
        model, _, rest = key.partition(".")
        given = [rest.partition(".")[0]] if model == "model" else []
        known = [action.dest for action in parser._actions if action.dest and not action.dest.endswith(".help")]
        renamed = renamed_argument(DDCLReadoutModule, given, called=model, as_yaml=True)
        return renamed or f"unknown key {key!r}{_nearest_key(key, known)}"
    match = _UNKNOWN_CLASS.search(message)
    # Where a number or a word would do as well, as for a temperature, the class is not what is wrong.
    if match and not re.search(r"Expected a (<class 'float'>|typing\.Literal)", message):
        key, name = match.groups()
        inner = innermost_key(message) or key
        base = _BASES.get(inner, Callback)
        key = key if inner == key else f"{key}.init_args.{inner}"
        near = nearest(name, (c.__name__ for c in _subclasses(base)))
        own = "" if "." in name else f" One of your own is named with its module: MODULE.{name}."
        return f"unknown class {name!r} for {key}{near}{own}"
    wrong = missing_value(message) or missing_class(message) or missing_init(message) or wrong_value(message)
    if wrong:
        return wrong
    if match := _KEY_OF_NO_TEXT.search(message):
        return f"keys of settings must be text; got {match[1]}. Write the name of a setting, or put it in quotes."
    if slip := _slip(message):
        return slip
    if "Union subtypes" in message:
        checks = [line for line in _ALTERNATIVES.findall(message) if not line.startswith(_OF_PARSER)]
    else:
        checks = [message.partition("\n")[0]] if _ALTERNATIVE in message else []
    if not checks:
        return message
    return checks[0] if "; got" in checks[0] else _with_remedy(checks[0])


def _slip(message: str) -> str | None:
    """The sentence about a word that is missing, unknown or in the wrong place; None for other messages."""
    if match := _UNKNOWN_COMMAND.search(message):
        known = [*re.findall(r"\w+", match[2]), "recipes"]
        return f"unknown command {match[1]!r}{nearest(match[1], known)}"
    if match := _NO_COMMAND.search(message):
        return f"a command must be given; got none. Pass one of {', '.join(match[1].split(','))} or recipes."
    if match := _NO_VALUE.search(message):
        return f"{match[1]} must have a value; got none. Write it after the option."
    if match := _TOO_EARLY.search(message):
        return f"settings must come after the command; got {match[1]!r} before {match[2]!r}. Write {match[2]} first."
    return None


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """:func:`nearest` of settings by name, where what lies below a setting (``.init_args.K``) says nothing of it."""
    named = [word for word in known if ("." in word) == ("." in key)] or list(known)
    shortened = {word: ".".join(key.split(".")[: word.count(".") + 1]) for word in named}
    likeness = {word: difflib.SequenceMatcher(None, start, word).ratio() for word, start in shortened.items()}
    closest = max(likeness, key=likeness.__getitem__)
    return nearest(shortened[closest], [closest]) if likeness[closest] >= 0.5 else nearest(key, shortened)


def _is_any(path: str) -> bool:
    """True for a base that stands for all of its classes: the parser tries it last, and it takes no argument."""
    return find_class(path) in (Callback, LightningDataModule)


def lost_process(error: BaseException) -> str | None:
    """Message for a process that stops because another one of the run has ended; None for any other error."""
    if not is_lost_process(error):
        return None
    return (
        "another process of this run has ended, so this one stops too. The reason is what that process says, above or "
        "in its own log."
    )


def refused_in_worker(error: BaseException) -> str | None:
    """Message of a check of this package that failed in a worker process of a data loader; None for any other error.

    torch hands such an error on as one of the same kind whose text is the traceback of the worker.
    """
    first, _, trace = str(error).partition("\n")
    kind = re.match(r"Caught (\w+) in DataLoader worker process", first)
    files = re.findall(r'File "([^"]+)"', trace)
    if kind is None or not isinstance(error, ValueError) or not files:
        return None
    ours = (Path(module.__path__[0]).resolve() for module in (ddcl_lightning, datamodules))
    if not any(Path(files[-1]).resolve().is_relative_to(folder) for folder in ours):
        return None
    return trace.rpartition(f"\n{kind[1]}: ")[2].strip() or None


def unwritable(error: BaseException) -> str | None:
    """Message for a file that cannot be written, or too little memory; None for any other error."""
    if is_memory_short(error):
        return "there is not enough memory for sizes like these. Lower the number of prototypes, widths or batch sizes."
    if type(error).__name__ == "PathError" and "writable" in str(error):
        return f"{error} Choose a place where you may write with --trainer.default_root_dir."
    if isinstance(error, FileNotFoundError) and _makes_folder(error):
        return (
            f"{error.filename} must be in a folder that may be written to; it cannot be made ({error.strerror}). "
            "Choose another place (--trainer.default_root_dir for runs)."
        )
    if isinstance(error, OSError) and error.errno in _UNWRITABLE and _by_tensorboard(error):
        return events_unwritten(error)
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return f"{sentence(error)}. Make room, or choose another place (--trainer.default_root_dir for runs)."
    return None


def _by_tensorboard(error: BaseException) -> bool:
    """True if an error is one of the thread that writes events."""
    return any(
        str(frame.tb_frame.f_globals.get("__name__")).startswith(WRITERS) for frame in _frames(error.__traceback__)
    )


def _makes_folder(error: BaseException) -> bool:
    """True if an error is that of a folder that was to be made, whose own parent is there."""
    return any(frame.tb_frame.f_code.co_name in ("makedirs", "mkdir") for frame in _frames(error.__traceback__))


def restored_from(error: BaseException) -> Any:
    """Path of the checkpoint that a trainer was restoring when an error came up; None where it was not.

    An error in code of the user's, as the ``load_state_dict`` of a callback, is theirs.
    """
    frames = [frame.tb_frame for frame in _frames(error.__traceback__)]
    owners = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    connectors = [frame for frame in frames if str(frame.f_globals.get("__name__")).endswith(_RESTORES)]
    if not connectors or not _CARRIERS.issuperset(owners):
        return None
    return getattr(getattr(connectors[0].f_locals.get("self"), "trainer", None), "ckpt_path", None)


def damaged(error: BaseException) -> str | None:
    """Message for a checkpoint that holds something else than a run leaves; None for any other error."""
    path = restored_from(error)
    if path is None or not isinstance(error, (LookupError, TypeError, ValueError, AttributeError, RuntimeError)):
        return None
    return other_model(str(error), path) or (None if is_refusal(error) else cannot_be_restored(error, path))


def is_refusal(error: BaseException) -> bool:
    """True if an error of a run is a check of this package, whose message suffices without a traceback.

    It is where this package raised it on purpose (by a ``raise`` statement), or asked the standard library for a file
    or package that is missing, and no code of the user's lies between: then the place in their code matters.
    """
    if not isinstance(error, _CHECKED_IN_RUN):
        return False
    frames = list(_frames(error.__traceback__))
    owners = [str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    if not _CARRIERS.issuperset(owners):
        return False
    missing = isinstance(error, (OSError, ImportError))
    while missing and owners and owners[-1] in sys.stdlib_module_names:
        owners.pop()
    if other_model(str(error)) is not None:
        return True
    # Lightning's own argument checks say what is wrong as ours do.
    refuses = owners[-1:] == ["lightning"] and isinstance(error, _REFUSED_BY_LIGHTNING)
    if frames and str(frames[-1].tb_frame.f_globals.get("__name__")).startswith(_CALLBACKS):
        refuses = refuses or isinstance(error, RuntimeError)
    return (owners[-1:] == [_PACKAGE] or refuses) and (missing or _raised_here(frames[-1]))


def sentence(error: BaseException) -> str:
    """Message of an error, without an error number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    for pattern, remedy in _REMEDIES.items():
        if isinstance(error, (MisconfigurationException, ImportError)) and re.search(pattern, str(error)):
            return remedy
    if (other := other_model(str(error))) is not None:
        return other
    if match := _SAME_STATE.search(str(error)):
        return _same_state(match[1])
    text = str(error) or type(error).__name__
    raised = list(_frames(error.__traceback__))
    owner = str(raised[-1].tb_frame.f_globals.get("__name__", "")).partition(".")[0] if raised else ""
    return _with_remedy(" ".join(text.split())) if owner == "lightning" else text


def _same_state(name: str) -> str:
    """Sentence about two callbacks of a class whose states a checkpoint could not tell apart."""
    kind = next((kind for kind in _subclasses(Callback) if kind.__name__ == name), Callback)
    apart = {"banks": "a pattern of its own as banks", "monitor": "another monitor or interval"}
    ways = [way for argument, way in apart.items() if argument in inspect.signature(kind).parameters]
    another = f", or give the other {ways[0]}" if ways else ""
    return (
        f"trainer.callbacks must not hold two of {name} whose states are one in a checkpoint; got another beside that "
        f"of the config. Change that one in a config of your own (`ddcl recipes copy`){another}."
    )


def _with_remedy(message: str) -> str:
    """A refusal of Lightning's, which says what is wrong, with the word to correct."""
    names = [name for name in inspect.signature(Trainer).parameters if re.search(rf"\b{name}\b", message)]
    given = [name for name in names if f"{name}=" in message]  # as in Trainer(devices=0)
    remedy = f" Correct --trainer.{max(given or names, key=len)}." if names else ""
    return f"{message.strip().rstrip('.')}.{remedy}"


def _frames(trace: TracebackType | None) -> Iterable[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _raised_here(frame: TracebackType) -> bool:
    """True if the frame stopped at a ``raise`` statement, not at an operation that failed, which is a bug."""
    return frame.tb_frame.f_code.co_code[frame.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _subclasses(base: type) -> Iterable[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child
        yield from _subclasses(child)
