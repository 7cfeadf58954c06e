"""Kill runs of the recipes at random moments, resume them until they end, and compare the ends bit for bit.

Every trial starts ``ddcl fit`` in a process of its own, sends SIGKILL or SIGTERM at a random moment, and resumes from
the newest checkpoint; some are killed again. Compared with the run that nobody killed: weights and buffers, the state
of the optimizers, and that of the callbacks, the random generators among them.

    python benchmarks/kills.py
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from ddcl_lightning import IdentityBackbone, cli

LIMIT = 1800.0  # seconds after which a run counts as hanging; a busy machine is slow
_ADD = "--trainer.callbacks+="
_DROPOUT = ["--model.backbone", "kills.DroppedOut", "--trainer.max_epochs", "4"]
_FEW = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "12"]
_SPLITS = ["--trainer.max_epochs", "5", f"{_ADD}AdaptiveBankSize"]
_SPLITS += ["--trainer.callbacks.rules={max_prototypes: 24, significance: null}"]
RECIPES: dict[str, tuple[str, str, list[str], int]] = {  # label, recipe, what makes it short, trials per seed
    "digits": ("digits", "digits", ["--trainer.max_epochs", "4"], 4),
    "digits-dropout": ("digits, dropout", "digits", _DROPOUT, 4),
    "digits-adaptive-size": ("digits, adaptive", "digits", _SPLITS, 4),
    "digits_adaptive": ("digits_adaptive", "digits_adaptive", ["--trainer.max_epochs", "8"], 3),
    "digits_soft_vq": ("digits_soft_vq", "digits_soft_vq", _FEW, 3),
    "digits_vqvae": ("digits_vqvae", "digits_vqvae", _FEW, 3),
    "digits_hierarchical": ("digits_hierarchical", "digits_hierarchical", ["--trainer.max_epochs", "2"], 3),
    "debris": ("debris", "debris", ["--trainer.max_epochs", "12", "--trainer.check_val_every_n_epoch", "2"], 3),
    "vit_digits": ("vit_digits", "vit_digits", [*_FEW[:3], "5", "--summary.compare", "false"], 3),
}
CASES = {
    name: Case(label, {"recipe": recipe, "words": words, "trials": trials})
    for name, (label, recipe, words, trials) in RECIPES.items()
}


class DroppedOut(IdentityBackbone):
    """A trainable encoder of digits with dropout."""

    def __init__(self, in_features: int = 64, p: float = 0.3) -> None:
        super().__init__(in_features)
        self.net = nn.Sequential(nn.Linear(in_features, 16), nn.Dropout(p))
        self.embed_dim = 16

    def forward(self, batch: Any) -> Any:
        """Tokens of a batch."""
        tokens = super().forward(batch)
        return tokens._replace(values=self.net(tokens.values))


class End(Callback):
    """Writes all that a run ends with to ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        states = {
            callback.state_key: callback.state_dict()
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if not isinstance(callback, ModelCheckpoint)  # it knows its folder
        }
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        end = {"step": trainer.global_step, "epoch": trainer.current_epoch, "callbacks": states}
        torch.save({**end, "optimizers": optimizers, "weights": pl_module.state_dict()}, self.path)


def start(config: Config, folder: Path, checkpoint: Path | None = None) -> int:
    """Begin a run in a process of its own; its number."""
    words = ["fit", "--config", config["recipe"], *config["words"]]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    words += [f"{_ADD}lightning.pytorch.callbacks.ModelCheckpoint", f"--trainer.callbacks.dirpath={folder}/saved"]
    words += ["--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.save_top_k=-1"]
    words += [f"{_ADD}kills.End", f"--trainer.callbacks.path={folder}/end.pt"]
    words += [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()  # the imports are done
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        cli.main(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(process: int, limit: float = LIMIT) -> int | None:
    """The exit code; None, and the process killed, after ``limit`` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The readable checkpoint of the latest step, and the names of those that cannot be read."""
    readable, torn = [], []
    for path in folder.rglob("*.ckpt"):
        try:
            step = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
            readable.append((step, path.stat().st_mtime, path))
        except Exception:
            torn.append(path.name)
    return (max(readable)[-1] if readable else None), torn


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Differences of two nested states."""
    if torch.is_tensor(left) and torch.is_tensor(right):
        if left.shape != right.shape or not torch.equal(left.nan_to_num(), right.nan_to_num()):
            yield where
    elif isinstance(left, dict) and isinstance(right, dict) and set(left) == set(right):
        for key in left:
            yield from differences(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        for place, (first, second) in enumerate(zip(left, right, strict=True)):
            yield from differences(first, second, f"{where}[{place}]")
    elif not (left == right or (left != left and right != right)):
        yield where


def trial(config: Config, folder: Path, whole: Any, seconds: float, draw: random.Random) -> dict[str, Any]:
    """One run that is killed, some twice, and resumed."""
    kills: list[str] = []
    torn: list[str] = []
    checkpoint = None
    for _ in range(draw.choice([1, 1, 2])):
        process = start(config, folder, checkpoint)
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        if draw.random() < 0.25:  # anywhere, the start included
            code = watch(process, draw.uniform(0.05, 1.0) * seconds)
        else:  # while it trains
            goal = count(folder) + draw.randint(0, max(1, whole["step"] // 2 - count(folder)))
            code = watch(process, LIMIT, lambda goal=goal: count(folder) >= goal)  # type: ignore[misc]
            code = watch(process, draw.uniform(0.0, 0.3)) if code is None else code
        if code is None:
            os.kill(process, number)
            code = wait(process)
        checkpoint, unreadable = newest(folder)
        torn += unreadable
        kills.append(f"{number.name} -> {code} from {checkpoint.name if checkpoint else 'nothing'}")
    (folder / "end.pt").unlink(missing_ok=True)
    code = wait(start(config, folder, checkpoint))
    if code != 0:
        return {"kills": kills, "torn": torn, "end": f"exit code {code}"}
    different = list(differences(whole, torch.load(folder / "end.pt", weights_only=False)))
    return {"kills": kills, "torn": torn, "end": "equal" if not different else f"differs: {different[:5]}"}


def count(folder: Path) -> int:
    """Checkpoints so far."""
    return sum(1 for _ in folder.glob("saved/*.ckpt"))


def watch(process: int, seconds: float, reached: Callable[[], bool] = lambda: False) -> int | None:
    """The exit code, or None if the process is still there after that time, or when ``reached`` says so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not reached():
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def run(config: Config, seed: int, options: Options) -> Run:
    """The run that nobody kills, and trials of being killed."""
    generator, trials = random.Random(f"{config} {seed}"), []
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        code = wait(start(config, Path(root) / "whole"))
        if code != 0:
            log = (Path(root) / "whole" / "log").read_text()
            raise RuntimeError(f"{config['recipe']} ends with {code}: {log[-2000:]}")
        seconds = time.monotonic() - began
        whole = torch.load(Path(root) / "whole" / "end.pt", weights_only=False)
        for number in range(1 if options.quick else config["trials"]):
            trials.append(trial(config, Path(root) / str(number), whole, seconds, generator))
            if trials[-1]["end"] != "equal":
                print(trials[-1], flush=True)
    return {"trials": trials}


def table(results: Results) -> Table:
    """A row per recipe, and their sums."""
    groups = {CASES[name].label: results.of(name) for name in results.where()}
    rows = [["recipe", "runs", "killed", "ends equal bit for bit", "torn checkpoints"]]
    for label, runs in {**groups, "all": results.runs}.items():
        trials = [trial for run in runs for trial in run["trials"]]
        kills = sum(" -> 0 " not in kill for trial in trials for kill in trial["kills"])  # others had ended before
        equal = sum(trial["end"] == "equal" for trial in trials)
        torn = sum(len(trial["torn"]) for trial in trials)
        rows.append([label, f"{len(trials)}", f"{kills} times", f"{equal}", f"{torn}"])
    return rows


STUDY = Study(
    "kills",
    CASES,
    run,
    {"recipes": table},
    seeds=(7, 8),
    quick={"digits-dropout": CASES["digits-dropout"]},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
