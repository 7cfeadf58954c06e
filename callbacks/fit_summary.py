"""The table at the end of fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ddcl_lightning.batch import Batch, labels
from ddcl_lightning.callbacks.decomposition_check import DecompositionCheck
from ddcl_lightning.compat import to_device
from ddcl_lightning.distributed import gather_objects, is_first_process
from ddcl_lightning.kmeans import initial_prototypes
from ddcl_lightning.metrics import ClusteringMetrics
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.probe import BankProbe, Observation, find_banks
from ddcl_lightning.signals import HeadSignals, read_signals

MAX_SAMPLES = 65_536


@dataclass
class _Evaluation:
    """One pass over the evaluation data; rows are samples, the same order everywhere."""

    features: Tensor  # (M, D): mean token of each sample as the backbone gives it
    labels: Tensor  # (M,), -1 where unknown
    clusters: Tensor | None  # (M, H)
    signals: list[HeadSignals]


class FitSummary(Callback):
    """Prints, when ``fit`` ends, how the readout stands beside k-means on the same features.

    The rows are computed in one pass over the validation data (the training data where there is none), on the weights of
    the last step, not of the best one. Every sample's k-means feature is the mean of its tokens as the backbone gives
    them; where the encoder was trained, k-means on the features before training stands beside it.

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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster the features of an encoder that is about to change."""
        if not self._applies(pl_module) or self._before is not None:
            return
        assert isinstance(pl_module, DDCLReadoutModule)
        if pl_module.parameter_groups()["encoder"]:
            found = self._evaluate(trainer, pl_module)
            self._before = self._kmeans(pl_module, found) if is_first_process() else {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate and print."""
        if not self._applies(pl_module):
            return
        assert isinstance(pl_module, DDCLReadoutModule)
        found = self._evaluate(trainer, pl_module)
        if not is_first_process():
            return
        if found.clusters is not None:
            heads = found.clusters.shape[1]
            for head in range(heads):
                label = "prototypes (last step)" + (f", head {head}" if heads > 1 else "")
                size = found.signals[head].num_prototypes
                self.rows[label] = _agreement(found.clusters[:, head], found.labels, size)
        if self._before is not None:
            self.rows["k-means, features before training"] = self._before
        trained = " after training" if self._before is not None else ""
        self.rows[f"k-means, features{trained}"] = self._kmeans(pl_module, found)
        self.table = self._format(trainer, found)
        print(self.table)

    def _applies(self, module: pl.LightningModule) -> bool:
        return self.enabled and isinstance(module, DDCLReadoutModule) and bool(find_banks(module.head))

    def _kmeans(self, module: DDCLReadoutModule, found: _Evaluation) -> dict[str, float]:
        size = list(find_banks(module.head).values())[-1].num_prototypes
        try:
            centers = initial_prototypes(found.features, size, num_restarts=self.num_restarts)
        except ValueError:  # fewer distinct samples than prototypes: no baseline, but the run keeps its table
            return {}
        clusters = torch.cdist(found.features.double(), centers).argmin(1)
        return _agreement(clusters, found.labels, size)

    @torch.no_grad()
    def _evaluate(self, trainer: pl.Trainer, module: DDCLReadoutModule) -> _Evaluation:
        was_training = module.training
        module.eval()
        name, bank = list(find_banks(module).items())[-1]
        seen: dict[str, Observation] = {}
        features, truths, clusters, tokens = [], [], [], []
        with BankProbe({name: bank}, seen.__setitem__):
            for batch in _batches(trainer):
                batch = to_device(trainer, batch)
                values, mask = module.backbone(batch)
                readout = module.head(values, mask)
                features.append(_mean_token(values, mask))
                truth = labels(batch)
                truths.append(torch.full((len(values),), -1) if truth is None else truth.cpu())
                if readout.assignments is not None:
                    clusters.append(readout.assignments.argmax(-1).cpu())
                tokens.append(seen[name].valid_tokens().cpu().transpose(0, 1))
                if sum(map(len, features)) >= MAX_SAMPLES:
                    break
        module.train(was_training)
        rows = gather_objects(
            (torch.cat(features), torch.cat(truths), torch.cat(clusters) if clusters else None, torch.cat(tokens))
        )
        stacked = torch.cat([row[3] for row in rows]).transpose(0, 1)[:, :MAX_SAMPLES]
        whole = Observation(stacked, None, bank.prototypes.detach().cpu(), bank.temperature.cpu(), seen[name].terms)
        return _Evaluation(
            features=torch.cat([row[0] for row in rows]),
            labels=torch.cat([row[1] for row in rows]),
            clusters=torch.cat([row[2] for row in rows]) if clusters else None,
            signals=read_signals(whole, bank.detach_assignments),
        )

    def _format(self, trainer: pl.Trainer, found: _Evaluation) -> str:
        names = ("acc", "nmi", "ari", "usage", "perplexity")
        width = max(map(len, self.rows)) + 2
        lines = ["", " " * width + "".join(f"{name.upper() if len(name) == 3 else name:>12}" for name in names)]
        for label, values in self.rows.items():
            cells = (f"{values[name]:>12.3f}" if name in values else f"{'-':>12}" for name in names)
            lines.append(f"{label:<{width}}" + "".join(cells))
        lines.append("")
        for head, now in enumerate(found.signals):
            prefix = f"head {head}: " if len(found.signals) > 1 else ""
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


def _batches(trainer: pl.Trainer) -> Iterator[Batch]:
    loaders = trainer.val_dataloaders
    if loaders is None:
        yield from trainer.train_dataloader or ()
        return
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        yield from loader


def _mean_token(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(1).float().cpu()
    keep = mask.unsqueeze(-1)
    return (values.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)).float().cpu()


def _agreement(clusters: Tensor, truth: Tensor, num_clusters: int) -> dict[str, float]:
    known = truth >= 0
    metric = ClusteringMetrics(num_clusters, int(truth.max()) + 1 if bool(known.any()) else 1)
    metric.update(clusters, truth)
    names = ("acc", "nmi", "ari", "usage", "perplexity") if bool(known.any()) else ("usage", "perplexity")
    values = metric.compute()
    return {name: float(values[name]) for name in names}
