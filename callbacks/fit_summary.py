"""The table at the end of fit."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.compat import callbacks_of, to_device, train_batches
from ddcl_lightning._utils.distributed import gather_objects, is_lost_process, on_every_process, report, skipped
from ddcl_lightning._utils.reservoir import Reservoir, evenly_spaced
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._base import is_new_run
from ddcl_lightning.callbacks._id_table import id_lines
from ddcl_lightning.callbacks.collapse_warning import CollapseWarning
from ddcl_lightning.callbacks.decomposition_check import DecompositionCheck
from ddcl_lightning.functional import assignment_statistics, split_margins
from ddcl_lightning.metrics.evaluation_pass import flat_loaders
from ddcl_lightning.metrics.probing import (
    CLUSTERING_METRICS,
    UNLABELLED_METRICS,
    ProbeScore,
    Readouts,
    clustering_scores,
    collect_readouts,
    kmeans_scores,
    linear_probe,
)
from ddcl_lightning.monitoring.recording import BankRecord
from ddcl_lightning.monitoring.signals import read_signals
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks.readout_module import ReadoutModule

MAX_TOKENS = 65_536  # for the signals of the bank
RECONSTRUCTION_METRICS = ("mse", "psnr", "ssim", "usage", "perplexity", "soft_perplexity")
MAX_SPLIT_TOKENS = 2048
MAX_SPLIT_WORK = 10**10  # multiplications: below a second or two
TITLES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "r2": "R2"}
NAME = "FitSummary"  # for its warnings


class _Evaluation(NamedTuple):
    """One pass of all processes."""

    readouts: Readouts
    tokens: dict[str, Tensor]  # (H, N, d): sample of what each bank saw


class FitSummary(Callback):
    """Table at the end of ``fit`` that compares a module's readout with simple readouts of the same features.

    The rows are computed in one pass over the validation data (the training data where there is none), on the
    weights of the last step, not of the best one. k-means clusters the mean token of every sample: as the prototypes
    see it at the end (*bank inputs*), and, where that differs, as the backbone gives it, before training if the encoder
    was trained. This separates a gain of the embedding from a gain of the prototypes. In the rows a sample counts once,
    for its strongest prototype; an autoencoder's line below them counts tokens, and the table of semantic IDs items. An
    error in the summary is a warning and does not end the run.

    Without labels R^2 takes the place of ACC, NMI and ARI: the part of the variance of the bank inputs that lies
    between the clusters, 1 for no inertia. It is of the same points in all rows, but for k-means from before training,
    of which it is not known.

    Args:
        enabled: Whether to run at all.
        num_restarts: Restarts of the k-means baseline.
        compare: Evaluate the head's pooled output too, by k-means and a linear probe (logistic regression
            fitted on the training data), beside linear probes on the mean token and on the first one (CLS). Costs a
            pass over the training data, up to 65,536 samples of it.

    Attributes:
        table: The printed text, after ``fit``.
        rows: Its rows as data: label to metrics.
        probes: The linear probes: label to accuracy and macro F1.
    """

    @typed
    def __init__(self, enabled: bool = True, num_restarts: int = 10, compare: bool = False) -> None:
        if num_restarts < 1:
            raise ValueError(f"num_restarts must be at least 1; got {num_restarts}. Pass 1 for a single start.")
        self.enabled, self.num_restarts, self.compare = enabled, num_restarts, compare
        self.table = ""
        self.rows: dict[str, dict[str, float]] = {}
        self.probes: dict[str, ProbeScore] = {}
        self._before: dict[str, float] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop the results of an earlier run of the trainer, unless this one continues it."""
        self.table, self.rows, self.probes = "", {}, {}
        if is_new_run(trainer, stage):
            self._before = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster the features of an encoder that is about to change."""
        if not self._applies(pl_module) or self._before is not None:
            return
        assert isinstance(pl_module, ReadoutModule)
        if pl_module.parameter_groups()["encoder"]:
            evaluation = self._evaluate(trainer, pl_module, _evaluation_loaders(trainer))
            if evaluation is not None:
                self._before = report(
                    lambda: self._kmeans(pl_module, evaluation.readouts, evaluation.readouts.mean),
                    NAME,
                    "a row of its table",
                )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the readouts and print the table."""
        if not self._applies(pl_module):
            return
        assert isinstance(pl_module, ReadoutModule)
        evaluation = self._evaluate(trainer, pl_module, _evaluation_loaders(trainer))
        train = self._evaluate(trainer, pl_module, [train_batches(trainer)]) if self.compare else None
        if evaluation is None:
            return
        if train is not None:
            report(
                lambda: self._fill_probes(train.readouts.labelled(), evaluation.readouts.labelled()), NAME, "its probes"
            )
        self.table = report(lambda: self._fill(trainer, pl_module, evaluation), NAME, "its table") or ""
        if self.table:
            print(self.table)

    def _applies(self, module: pl.LightningModule) -> bool:
        return self.enabled and isinstance(module, ReadoutModule)

    def _fill(self, trainer: pl.Trainer, module: ReadoutModule, evaluation: _Evaluation) -> str:
        banks, now = list(find_banks(module.head).values()), evaluation.readouts
        size = _num_clusters(module, now)  # codes of a head without a bank may be more
        for head in range(now.clusters.shape[1]):
            label = "prototypes (last step)" + (f", head {head}" if now.clusters.shape[1] > 1 else "")
            clusters = now.clusters[:, head]
            points = now.inputs if banks else now.mean
            if banks and points.shape[1] % now.clusters.shape[1] == 0:
                points = points.chunk(now.clusters.shape[1], 1)[head]
            self.rows[label] = clustering_scores(clusters, now.labels, max(size, int(clusters.max()) + 1), points)
        if self.compare or not banks:
            self.rows["k-means, pooled readout"] = self._kmeans(module, now, now.pooled)
        untouched = now.inputs.shape == now.mean.shape and torch.allclose(now.inputs, now.mean)
        if banks and (self._before is not None or not untouched):
            self.rows["k-means, bank inputs"] = self._kmeans(module, now, now.inputs)
        if self._before is not None:
            before = {name: value for name, value in self._before.items() if name != "r2"}  # of other points
            self.rows["k-means, features before training"] = before
        else:
            self.rows["k-means, features"] = self._kmeans(module, now, now.mean)
        lines = _bank_lines(banks, list(evaluation.tokens.values()))
        return self._format(trainer, module, lines)

    def _fill_probes(self, train: Readouts, test: Readouts) -> None:
        rows = {"pooled readout": "pooled", "mean token": "mean", "first token": "first"}
        if torch.equal(test.first, test.mean):
            del rows["first token"]
        for label, name in rows.items():
            score = report(
                lambda name=name: linear_probe(  # type: ignore[misc]
                    getattr(train, name), train.labels, getattr(test, name), test.labels
                ),
                NAME,
                f"its probe on the {label}",
            )
            if score is not None:
                self.probes[label] = score

    def _kmeans(self, module: ReadoutModule, now: Readouts, points: Tensor) -> dict[str, float]:
        return kmeans_scores(
            points,
            now.labels,
            _num_clusters(module, now),
            num_restarts=self.num_restarts,
            space=now.inputs if now.inputs.shape[1] else now.mean,
        )

    def _evaluate(
        self, trainer: pl.Trainer, module: ReadoutModule, loaders: list[Iterator[Batch]]
    ) -> _Evaluation | None:
        """The pass of all processes over the loaders; None where one of them failed, so that none waits for another."""
        samples = {name: Reservoir(MAX_TOKENS) for name in find_banks(module.head)}

        def run() -> list[Readouts]:
            with isolate_rng(), trainer.precision_plugin.val_step_context():
                return [
                    collect_readouts(module, batches, tokens=samples, to_device=lambda batch: to_device(trainer, batch))
                    for batches in loaders
                ]

        try:
            local = on_every_process(run)
        except Exception as error:  # a finished run must not end in an error of its summary
            if is_lost_process(error):  # that run has not finished well
                raise
            rank_zero_warn(skipped(NAME, "its table", error))
            return None
        tokens = {name: sample.gather().transpose(0, 1) for name, sample in samples.items()}
        # An index means nothing beyond its loader.
        readouts = [Readouts.cat(by_process).in_order() for by_process in zip(*gather_objects(local), strict=True)]
        return _Evaluation(Readouts.cat(readouts), tokens)

    def _format(self, trainer: pl.Trainer, module: ReadoutModule, bank_lines: list[str]) -> str:
        width = max(map(len, [*self.rows, *self.probes])) + 2
        columns = UNLABELLED_METRICS if any("r2" in values for values in self.rows.values()) else CLUSTERING_METRICS
        titles = (f"{TITLES.get(name, name):>12}" for name in columns)
        lines = ["", " " * width + "".join(titles)]
        for label, values in self.rows.items():
            cells = (f"{values[name]:>12.3f}" if name in values else f"{'-':>12}" for name in columns)
            lines.append(f"{label:<{width}}" + "".join(cells))
        if columns is UNLABELLED_METRICS:
            lines.append("no labels: R2 is the part of the variance of the bank inputs that lies between the clusters")
        if self.probes:
            lines += ["", f"{'linear probe on':<{width}}{'ACC':>12}{'F1':>12}"]
            lines += [f"{label:<{width}}{score.acc:>12.3f}{score.f1:>12.3f}" for label, score in self.probes.items()]
        lines.append("")
        for key in ("val/acc", "val/f1"):
            if key in trainer.callback_metrics and "val/cross_entropy" in trainer.callback_metrics:
                lines.append(f"classifier {key}: {float(trainer.callback_metrics[key]):.4f}")
        if "val/reconstruction" in trainer.callback_metrics:
            logged = {name: trainer.callback_metrics.get(f"val/{name}") for name in RECONSTRUCTION_METRICS}
            cells = (f"{name} {float(value):.4g}" for name, value in logged.items() if value is not None)
            lines.append("reconstruction (val): " + ", ".join(cells))
        lines += id_lines(trainer.callback_metrics)
        sizes = {
            type(submodule).__name__: sum(p.numel() for p in submodule.parameters())
            for submodule in (module.head, module.task)
        }
        lines.append("parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        if not bank_lines:
            return "\n".join([*lines, *_verdicts(trainer)])
        lines += bank_lines
        checks = [callback for callback in callbacks_of(trainer) if isinstance(callback, DecompositionCheck)]
        lines += [f"decomposition: {c.violations} violations in {c.checks} checks" for c in checks] or [
            "decomposition: not checked (add DecompositionCheck)"
        ]
        lines += _verdicts(trainer)
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """The baseline from before training, which a resumed run can no longer compute."""
        return {"before": self._before}

    @restores(before=(Mapping, type(None)))
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the baseline from before training."""
        self._before = state_dict["before"]


def _bank_lines(banks: list[PrototypeBank], samples: list[Tensor]) -> list[str]:
    """A line on every head of every bank, from samples of its tokens ``(H, N, d)``."""
    lines = []
    for level, (bank, tokens) in enumerate(zip(banks, samples, strict=True), 1):
        prototypes, temperature = bank.prototypes.detach().cpu(), bank.temperature.cpu()
        detach = bank.detach_assignments
        record = BankRecord.without_call(tokens, prototypes, temperature, detach_assignments=detach)
        for head, now in enumerate(read_signals(record)):
            places = [f"level {level}"] * (len(banks) > 1) + [f"head {head}"] * (bank.num_heads > 1)
            lines.append(
                f"{', '.join(places)}{': ' if places else ''}Delta {now.delta_min:.4g} (mean {now.delta_mean:.4g}), "
                f"embeddings' spread {now.scale:.4g}, H / ln K {now.entropy_ratio:.3f}, T / T_c "
                f"{now.temperature_ratio:.3g}{_next_split(tokens[head], prototypes[head], temperature[head], detach)}"
            )
    return lines


def _next_split(tokens: Tensor, prototypes: Tensor, temperature: Tensor, detach_assignments: bool) -> str:
    """Which prototype would split next as T falls, where that is quickly known."""
    if len(prototypes) * MAX_SPLIT_TOKENS * tokens.shape[1] ** 2 > MAX_SPLIT_WORK:
        return ""
    sample = evenly_spaced(tokens, MAX_SPLIT_TOKENS)
    margins = split_margins(sample, prototypes, temperature, detach_assignments=detach_assignments)
    # Of a cell without tokens of its own the margin is that of far tails, and says nothing.
    used = assignment_statistics(sample, prototypes, temperature).counts > 0
    margins = margins.masked_fill(~(used & torch.isfinite(margins)), math.inf)
    if not bool(torch.isfinite(margins).any()):
        return ""
    return f", nearest to a split {int(margins.argmin())} (margin {float(margins.min()):.2g})"


def _verdicts(trainer: pl.Trainer) -> list[str]:
    """Verdicts of every CollapseWarning, one line for each codebook."""
    watches = [callback for callback in callbacks_of(trainer) if isinstance(callback, CollapseWarning)]
    lines = [f"health of {line}" for watch in watches for line in watch.verdict().splitlines()]
    return lines or ["health of codebooks: not watched (add CollapseWarning)"]


def _num_clusters(module: ReadoutModule, now: Readouts) -> int:
    """Prototypes of the last bank; for a head without one, the classes."""
    banks = list(find_banks(module.head).values())
    return banks[-1].num_prototypes if banks else max(1, int(now.labels.max()) + 1)


def _evaluation_loaders(trainer: pl.Trainer) -> list[Iterator[Batch]]:
    loaders = trainer.val_dataloaders
    if loaders is None or not sum(trainer.num_val_batches):
        return [train_batches(trainer)]
    # Trainer(limit_val_batches=...) counts here too: the table describes what validation saw.
    return [
        _first(loader, batches)
        for loader, batches in zip(flat_loaders(loaders), trainer.num_val_batches, strict=True)
        if batches
    ]


def _first(loader: Iterable[Batch], batches: float) -> Iterator[Batch]:
    """The first batches of a loader, whose iterator is created when the first of them is needed."""
    yield from islice(loader, None if math.isinf(batches) else int(batches))
