"""The table at the end of fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ddcl_lightning.batch import Batch, labels
from ddcl_lightning.callbacks._base import starts_anew
from ddcl_lightning.callbacks.decomposition_check import DecompositionCheck
from ddcl_lightning.compat import to_device, train_batches
from ddcl_lightning.distributed import gather_objects, is_first_process
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.kmeans import initial_prototypes
from ddcl_lightning.metrics import ClusteringMetrics
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.probe import BankProbe, Observation, all_tokens, find_banks
from ddcl_lightning.reservoir import Reservoir
from ddcl_lightning.signals import HeadSignals, read_signals

MAX_SAMPLES = 65_536
MAX_TOKENS = 65_536  # for the signals of the bank
_Result = TypeVar("_Result")
METRICS = ("acc", "nmi", "ari", "usage", "perplexity")


@dataclass
class _Evaluation:
    """One pass over the evaluation data; rows are samples, first of one process and then of all."""

    features: Tensor  # (M, D): mean token of each sample as the backbone gives it
    inputs: Tensor  # (M, H * d): the same as the last bank sees it, projected and scaled
    labels: Tensor  # (M,), -1 where unknown
    clusters: Tensor  # (M, H), with H = 0 where the head gives no assignments
    sample: Reservoir
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  # (H, N, d): sample of what the last bank saw


class FitSummary(Callback):
    """Prints, when ``fit`` ends, how the readout of a DDCLReadoutModule stands beside k-means on the same features.

    The rows are computed in one pass over the validation data (the training data where there is none), on the
    weights of the last step, not of the best one. k-means clusters the mean token of every sample: as the
    prototypes see it now (*bank inputs*), and, where that is something else, as the backbone gives it, before training
    where the encoder was trained. So a gain of the embedding and a gain of the prototypes can be told apart.
    Whatever goes wrong here is a warning: it never costs a run.

    Args:
        enabled: Whether to run at all.
        num_restarts: Restarts of the k-means baseline.

    Attributes:
        table: The printed text, after ``fit``.
        rows: Its rows as data: label to metrics.
    """

    def __init__(self, enabled: bool = True, num_restarts: int = 10) -> None:
        if num_restarts < 1:
            raise ValueError(f"num_restarts must be at least 1; got {num_restarts}.")
        self.enabled, self.num_restarts = enabled, num_restarts
        self.table = ""
        self.rows: dict[str, dict[str, float]] = {}
        self._before: dict[str, float] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self.table, self.rows = "", {}
        if starts_anew(trainer, stage):
            self._before = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster the features of an encoder that is about to change."""
        if not self._applies(pl_module) or self._before is not None:
            return
        assert isinstance(pl_module, DDCLReadoutModule)
        if pl_module.parameter_groups()["encoder"]:
            found = self._evaluate(trainer, pl_module)
            if found is not None and is_first_process():
                self._before = self._try(lambda: self._kmeans(pl_module, found.features, found.labels))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate and print."""
        if not self._applies(pl_module):
            return
        assert isinstance(pl_module, DDCLReadoutModule)
        found = self._evaluate(trainer, pl_module)
        if found is not None and is_first_process():
            self.table = self._try(lambda: self._fill(trainer, pl_module, found)) or ""
            if self.table:
                print(self.table)

    def _applies(self, module: pl.LightningModule) -> bool:
        return self.enabled and isinstance(module, DDCLReadoutModule) and bool(find_banks(module.head))

    def _try(self, work: Callable[[], _Result]) -> _Result | None:
        """The result, or None and a warning: a finished run must not end in an error of its summary."""
        try:
            return work()
        except Exception as error:
            rank_zero_warn(f"FitSummary left out a part, the run is not affected: {type(error).__name__}: {error}")
            return None

    def _fill(self, trainer: pl.Trainer, module: DDCLReadoutModule, found: _Evaluation) -> str:
        bank = list(find_banks(module).values())[-1]
        for head in range(found.clusters.shape[1]):
            label = "prototypes (last step)" + (f", head {head}" if bank.num_heads > 1 else "")
            self.rows[label] = _agreement(found.clusters[:, head], found.labels, bank.num_prototypes)
        untouched = found.inputs.shape == found.features.shape and torch.allclose(found.inputs, found.features)
        if self._before is not None or not untouched:
            self.rows["k-means, bank inputs"] = self._kmeans(module, found.inputs, found.labels)
        if self._before is not None:
            self.rows["k-means, features before training"] = self._before
        else:
            self.rows["k-means, features"] = self._kmeans(module, found.features, found.labels)
        terms = Decomposition(*(torch.zeros(bank.num_heads) for _ in range(3)))  # not read
        look = Observation(found.tokens, None, bank.prototypes.detach().cpu(), bank.temperature.cpu(), terms)
        return self._format(trainer, read_signals(look, bank.detach_assignments))

    def _kmeans(self, module: DDCLReadoutModule, points: Tensor, truth: Tensor) -> dict[str, float]:
        size = list(find_banks(module).values())[-1].num_prototypes
        if len(torch.unique(points, dim=0)) < size:
            return {}  # no baseline, but the table stands
        centers = initial_prototypes(points, size, num_restarts=self.num_restarts)
        return _agreement(torch.cdist(points.double(), centers).argmin(1), truth, size)

    def _evaluate(self, trainer: pl.Trainer, module: DDCLReadoutModule) -> _Evaluation | None:
        """The pass of all processes; None where one of them failed, so that none waits for another."""
        part = self._try(lambda: _run_pass(trainer, module))
        if any(gather_objects(part is None)) or part is None:
            return None
        rows = zip(*gather_objects((part.features, part.inputs, part.labels, part.clusters)), strict=True)
        part.features, part.inputs, part.labels, part.clusters = map(torch.cat, rows)
        part.tokens = part.sample.gather().transpose(0, 1)
        return part

    def _format(self, trainer: pl.Trainer, signals: list[HeadSignals]) -> str:
        width = max(map(len, self.rows)) + 2
        lines = ["", " " * width + "".join(f"{name.upper() if len(name) == 3 else name:>12}" for name in METRICS)]
        for label, values in self.rows.items():
            cells = (f"{values[name]:>12.3f}" if name in values else f"{'-':>12}" for name in METRICS)
            lines.append(f"{label:<{width}}" + "".join(cells))
        lines.append("")
        for head, now in enumerate(signals):
            prefix = f"head {head}: " if len(signals) > 1 else ""
            lines.append(
                f"{prefix}Delta {now.delta_min:.4g} (mean {now.delta_mean:.4g}), embeddings' spread {now.scale:.4g}, "
                f"H / ln K {now.entropy_ratio:.3f}, T / T_c {now.temperature_ratio:.3g}"
            )
        checks = [callback for callback in trainer.callbacks if isinstance(callback, DecompositionCheck)]  # type: ignore[attr-defined]
        lines += [f"decomposition: {c.violations} violations in {c.checks} checks" for c in checks] or [
            "decomposition: not checked (add DecompositionCheck)"
        ]
        for key in ("val/acc", "val/f1"):
            if key in trainer.callback_metrics and "val/cross_entropy" in trainer.callback_metrics:
                lines.append(f"classifier {key}: {float(trainer.callback_metrics[key]):.4f}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """The baseline from before training, which a resumed run can no longer compute."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._before = state_dict["before"]


def _run_pass(trainer: pl.Trainer, module: DDCLReadoutModule) -> _Evaluation:
    """Features, labels, clusters and tokens of the evaluation data of this process."""
    name, bank = list(find_banks(module).items())[-1]
    modes = {child: child.training for child in module.modules()}
    seen: dict[str, Observation] = {}
    sample = Reservoir(MAX_TOKENS)
    features, embedded, truths, clusters = [], [], [], []
    module.eval()
    try:
        with torch.no_grad(), isolate_rng(), BankProbe({name: bank}, seen.__setitem__):
            for batch in _batches(trainer):
                batch = to_device(trainer, batch)
                with trainer.precision_plugin.val_step_context():
                    values, mask = module.backbone(batch)
                    readout = module.head(values, mask)
                features.append(_mean_token(values, mask))
                embedded.append(_mean_input(seen[name], len(values)))
                truths.append(_class_labels(batch, len(values)))
                if readout.assignments is not None:
                    clusters.append(readout.assignments.argmax(-1).cpu())
                sample.add(all_tokens(seen[name]))
                if sum(map(len, features)) >= MAX_SAMPLES:
                    break
    finally:
        for child, training in modes.items():
            child.training = training
    no_clusters = [torch.empty(sum(map(len, features)), 0, dtype=torch.int64)]
    return _Evaluation(
        torch.cat(features), torch.cat(embedded), torch.cat(truths), torch.cat(clusters or no_clusters), sample
    )


def _batches(trainer: pl.Trainer) -> Iterator[Batch]:
    loaders = trainer.val_dataloaders
    if loaders is None:
        yield from train_batches(trainer)
        return
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        yield from loader


def _mean_token(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(1).float().cpu()
    keep = mask.unsqueeze(-1)
    return (values.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)).float().cpu()


def _mean_input(seen: Observation, samples: int) -> Tensor:
    """Mean of each sample's tokens as a bank saw them, the heads side by side, ``(B, H * d)``."""
    rows = seen.tokens.transpose(0, 1).flatten(1)
    tokens = rows.reshape(samples, -1, rows.shape[1])
    return _mean_token(tokens, None if seen.mask is None else seen.mask[0].reshape(samples, -1))


def _class_labels(batch: Batch, size: int) -> Tensor:
    """One class per sample, ``(B,)``; -1 where there is none, or a target of another kind."""
    truth = labels(batch)
    if truth is None or truth.dim() != 1 or truth.is_floating_point():
        return torch.full((size,), -1)
    return truth.cpu().long()


def _agreement(clusters: Tensor, truth: Tensor, num_clusters: int) -> dict[str, float]:
    labelled = bool((truth >= 0).any())
    metric = ClusteringMetrics(num_clusters, int(truth.max()) + 1 if labelled else 1)
    metric.update(clusters, truth)
    values = metric.compute()
    return {name: float(values[name]) for name in (METRICS if labelled else METRICS[3:])}
