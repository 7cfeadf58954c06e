"""The ``ddcl`` command: ``fit``, ``validate``, ``test``, ``predict``, ``explain`` (by LightningCLI), ``recipes``."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import SUPPRESS, ArgumentError
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning_utilities.core.enums import StrEnum

from ddcl_lightning import backbones, datamodules, decoders, heads, tasks  # noqa: F401 - for their short class names
from ddcl_lightning._utils import compat
from ddcl_lightning._utils.distributed import end_together
from ddcl_lightning._utils.endings import tell_others, told_by_others
from ddcl_lightning._utils.interruption import INTERRUPTION, Interrupted, interruptible, signal_name
from ddcl_lightning._utils.seeding import check_seed
from ddcl_lightning.callbacks import AssignmentWriter, FitSummary, SaveOnSignal
from ddcl_lightning.checkpoints.reading import begins_anew, is_keyword, read_checkpoint
from ddcl_lightning.checkpoints.trust import check_hyper_parameters, stored_hyper_parameters
from ddcl_lightning.cli.config_files import check_config, check_text, check_words
from ddcl_lightning.cli.dropped_callbacks import dropped_callbacks
from ddcl_lightning.cli.errors import (
    CHECKED,
    damaged,
    explain,
    is_refusal,
    lost_process,
    refused_in_worker,
    sentence,
    unwritable,
)
from ddcl_lightning.cli.output_files import events_unwritten, silent_writers, whole_hparams
from ddcl_lightning.cli.overruled import overruled_settings, refusal
from ddcl_lightning.cli.run_config import SaveRunConfig, add_run_config, next_command
from ddcl_lightning.explain.trainer import ExplainingTrainer, check_request
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.optim.two_optimizers import require_precision
from ddcl_lightning.recipes import copy_recipe, describe, find_recipe, recipe_paths

SUBCOMMANDS = ("fit", "validate", "test", "predict", "explain")
RECIPES_HELP = "`ddcl recipes` lists the shipped recipes, and `ddcl recipes copy NAME` copies one to change it."


# A default that is an enumeration (that of Lightning's Timer) has to be written into a config.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))


class DDCLCommandLine(LightningCLI):
    """LightningCLI with a summary after ``fit``, a table after ``predict``, and errors that start with the key."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, and which of their arguments are not words of the command line."""
        return {**LightningCLI.subcommands(), "explain": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, visible under ``--print_config``."""
        parser.add_lightning_class_args(FitSummary, "summary")
        parser.add_lightning_class_args(AssignmentWriter, "predictions")
        parser.add_lightning_class_args(SaveOnSignal, "interruption")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and say in the first line which key is wrong and what was probably meant."""
        given = list(args) if isinstance(args, Sequence) else sys.argv[1:]
        self._words = given if args is None or isinstance(args, Sequence) else []
        name = next((word for word in given if word in SUBCOMMANDS), None)
        self._accept_settings_of_others()
        unknown = [
            key for key in self._foreign.get(name or "", ()) for word in given if word.split("=")[0] == f"--{key}"
        ]
        if unknown:
            _refuse(f"unknown key {unknown[0]!r} for {name}. Leave it out: it belongs to another command.")
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            _refuse(explain(str(error), self._parser(name) if name else parser))
        except (UnicodeDecodeError, RecursionError) as error:  # of a file of settings below the config
            _refuse(f"a file of settings must be YAML in UTF-8, and flat; {error}.")
        for name in self._foreign.get(self.config.get("subcommand") or "", ()):
            self.config[self.config["subcommand"]].pop(name, None)
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        with _refusals(ValueError):
            check_seed("seed_everything", int(settings.get("seed_everything") or 0))
            # Of the trainer on a CPU the module only sees what Lightning takes in its place.
            require_precision((settings.get("trainer") or {}).get("precision"))
        self._given = self._model_settings()
        self._check_checkpoint()
        self._warn_of_dropped_callbacks()
        if self.config.get("subcommand") == "explain":
            request = self.config["explain"]
            with _refusals(ValueError):
                check_request(request["ckpt_path"], request["output"])

    def _accept_settings_of_others(self) -> None:
        """Let the config that one subcommand wrote serve every other: what only the others know is passed over."""
        own = {name: {action.dest for action in self._parser(name)._actions} for name in SUBCOMMANDS}
        every = set().union(*own.values())
        self._foreign = {name: sorted(every - known) for name, known in own.items()}
        for name, keys in self._foreign.items():
            for key in keys:
                self._parser(name).add_argument(f"--{key}", type=Any, default=SUPPRESS, help=SUPPRESS)

    def _check_checkpoint(self) -> None:
        """Let a checkpoint run nothing: no pickle, and no module that it names and the user does not."""
        config = self.config.get(self.config.get("subcommand") or "")
        path = config.get("ckpt_path") if config else None
        if path is None:
            if self.config.get("subcommand") in ("validate", "test", "predict"):
                _refuse(
                    "ckpt_path is needed: without a checkpoint the weights are random. Pass --ckpt_path FILE.ckpt, "
                    "which `ddcl fit` writes below lightning_logs/."
                )
            return
        if config.get("weights_only") is None:
            config["weights_only"] = True  # Lightning's default is to run the pickles of a URL
        given = {value for value in vars(config.as_flat()).values() if isinstance(value, str)}
        resumes = self.config.get("subcommand") == "fit"
        with _refusals(ValueError):
            stored = stored_hyper_parameters(path, to_resume=resumes)
            anew = begins_anew(read_checkpoint(path, to_resume=True)) if resumes and not is_keyword(path) else []
            if anew:
                rank_zero_warn(f"ckpt_path {str(path)!r} is not all that a run leaves. {' '.join(anew)}")
            check_hyper_parameters(DDCLReadoutModule, stored, str(path), trusted=given)

    def _warn_of_dropped_callbacks(self) -> None:
        config = self.config.get(self.config.get("subcommand") or "")
        files = [path.get_content() for path in (config or {}).get("config") or () if path is not None]
        kept = config["trainer"]["callbacks"] if files else None
        dropped = dropped_callbacks(files, kept) if kept else []  # whoever asks for none gets none
        if dropped:
            rank_zero_warn(
                f"callbacks of an earlier config do not run, because a later list replaces them: {', '.join(dropped)}. "
                "To add to them, write callbacks+: in the later config, or --trainer.callbacks+=NAME."
            )

    def _model_settings(self) -> dict[str, Any]:
        """Settings of the model by their dotted names."""
        config = self.config.get(self.config.get("subcommand") or "")
        model = config.get("model") if config else None
        return {} if model is None else dict(vars(model.as_flat()))

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another model, and say what it overrules; a report is written by one process."""
        # LightningCLI takes the model's settings from the checkpoint, whatever the recipe and the words say.
        overruled = overruled_settings(self._given, self._model_settings(), self._words)
        refused = [setting for setting in overruled if setting.refused]
        if refused:
            _refuse(refusal(refused, self.config[self.subcommand].get("ckpt_path")))
        if overruled:
            listed = ", ".join(f"{name} = {stored!r} (not {given!r})" for name, stored, given, _ in overruled)
            rank_zero_warn(f"the model is built as ckpt_path was trained, with {listed}.")
        if self.subcommand == "explain":
            trainer = self.config["explain"]["trainer"]
            if trainer["devices"] == "auto":
                trainer["devices"] = 1
            trainer["logger"] = False
            self.save_config_callback = None

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; a refused argument is one line, not a traceback."""
        try:
            super().instantiate_classes()
        except (*CHECKED, RuntimeError, MemoryError) as error:
            short = unwritable(error)
            if _wants_traceback() or (short is None and not isinstance(error, CHECKED)):
                raise
            _refuse(short or explain(sentence(error), self.parser))
        launcher = self.trainer.strategy.launcher
        if launcher is not None:  # processes that are started from here end with this one
            INTERRUPTION.forward = launcher.kill
        given = self.config.get(self.subcommand) or {}
        if given.get("ckpt_path") == "last" and not compat.finds_last_checkpoint(self.trainer):
            _refuse(
                "ckpt_path last must find a checkpoint of an earlier run; there is none where ModelCheckpoint of this "
                "one writes. Name the file, or give ModelCheckpoint a dirpath and save_last=True, or leave ckpt_path "
                "out to start anew."
            )

    def after_fit(self) -> None:
        """Print the checkpoint and the next command."""
        for line in next_command(self.trainer, self.model):
            rank_zero_only(print)(line)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Words after ``ddcl``, or a config as a dict; by default those of the process.
    """
    unwritten: list[OSError] = []
    with interruptible(), silent_writers(unwritten), whole_hparams():
        try:
            _main(args)
            sys.stdout.flush()
            if unwritten:
                _refuse(events_unwritten(unwritten[0]))
        except OSError as error:  # of what is printed
            if _wants_traceback() or unwritable(error) is None:
                raise
            _refuse(str(unwritable(error)))
        except Interrupted as end:
            tell_others(end.number)
            if not end.reported:
                print(f"Ended by {signal_name(end.number)}; nothing was written.", file=sys.stderr)
            raise SystemExit(end.code) from None


def _main(args: ArgsType) -> None:
    if args is not None and not isinstance(args, list):
        _run(args)
        return
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["recipes"]:
        _recipes(words[1:])
        return
    with _refusals(ValueError):
        check_words(words)
        words = resolve_configs(add_run_config(words))
    # Reaches only threads that start later, so it comes before the first tensor; see DDCLReadoutModule.on_fit_start.
    torch.set_flush_denormal(True)
    with _arguments_of_process(words):
        _run(None)


def resolve_configs(words: list[str]) -> list[str]:
    """Replace the names of shipped recipes after ``--config`` by their paths; files come first.

    Raises:
        ValueError: If a config is neither a file nor a recipe.
    """
    resolved = list(words)
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        if equals:
            resolved[place] = f"{option}={_config_path(value)}"
        elif place + 1 < len(words):
            resolved[place + 1] = _config_path(words[place + 1])
    return resolved


def _config_path(value: str) -> str:
    # Several lines are a config written out on the command line.
    if "\n" in value:
        check_text(value, "--config")
        return value
    path = value if Path(value).exists() else str(find_recipe(value))
    check_config(path)
    return path


def _run(args: ArgsType) -> None:
    strict: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
    try:
        DDCLCommandLine(
            DDCLReadoutModule,
            pl.LightningDataModule,
            trainer_class=ExplainingTrainer,
            subclass_mode_data=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,  # the module makes its own two
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"epilog": RECIPES_HELP, **strict, **{name: dict(strict) for name in SUBCOMMANDS}},
            args=args,
        )
        end_together()
    except Exception as error:
        lost = lost_process(error)
        if lost is not None and (number := told_by_others()) is not None:
            print(f"Ended by {signal_name(number)}, which another process of this run got.", file=sys.stderr)
            raise SystemExit(128 + number) from None
        short = lost or refused_in_worker(error) or damaged(error) or (None if is_refusal(error) else unwritable(error))
        if short is not None and not _wants_traceback():
            _refuse(short)
        if _wants_traceback() or not is_refusal(error):
            raise
        _refuse(f"{sentence(error)}\n(DDCL_TRACEBACK=1 shows where.)")


class _RecipesParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, like everywhere else."""
        _refuse(f"{message}. `{self.prog} --help` shows what it takes.")


def _recipes(words: list[str]) -> None:
    parser = _RecipesParser(prog="ddcl recipes", description="List the shipped recipes, or copy one to change it.")
    commands = parser.add_subparsers(dest="command")
    copy = commands.add_parser("copy", help="copy a recipe into a folder")
    copy.add_argument("name", help="name of the recipe")
    copy.add_argument("folder", nargs="?", default=".", help="where to; by default here")
    given = parser.parse_args(words)
    if given.command == "copy":
        with _refusals(ValueError, OSError):
            print(copy_recipe(given.name, given.folder))
        return
    paths = recipe_paths()
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        print(f"{name:<{width}}  {describe(path)}")


def _wants_traceback() -> bool:
    return os.environ.get("DDCL_TRACEBACK", "0") not in ("", "0")


def _refuse(message: str) -> NoReturn:
    """End with a line and exit code 2."""
    rank: int = getattr(rank_zero_only, "rank", 0)
    print(f"error{f' in process {rank}' if rank else ''}: {message}", file=sys.stderr)
    raise SystemExit(2) from None


@contextmanager
def _refusals(*kinds: type[Exception]) -> Iterator[None]:
    """End so at these errors, which say all there is to say."""
    try:
        yield
    except kinds as error:
        _refuse(str(error))


@contextmanager
def _arguments_of_process(words: list[str]) -> Iterator[None]:
    """LightningCLI warns about arguments that are passed while the process has its own."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
