"""Predictions of a linear classifier as exact sums over tokens and prototypes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.explain.batch_summary import BatchSummary
from ddcl_lightning.explain.explanation import Decision, Place
from ddcl_lightning.explain.faithfulness import BATCH, KNOCK_OUTS, pad_samples
from ddcl_lightning.explain.samples import Album
from ddcl_lightning.explain.token_scores import class_terms, margins, readout_logits
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.module import DDCLReadoutModule

TOLERANCE = 1e-3  # of the logits' scale, by which a sum may miss them


class Decider:
    """Function from a readout to :class:`~ddcl_lightning.explain.explanation.Decision`, for a module that classifies.

    Args:
        module: In evaluation mode.
        shape: H and K of the bank that the page shows.

    Attributes:
        reason: Why there are no exact contributions, one sentence; None while there are.
        classifier: The linear classifier of the pooled readout; None where the task has none.
    """

    def __init__(self, module: DDCLReadoutModule, shape: tuple[int, int]) -> None:
        self._module, self.head, self._shape = module, module.head, shape
        classifier = getattr(module.task, "classifier", None)
        self.classifier: nn.Linear | None = None
        if isinstance(classifier, nn.Linear) and classifier.in_features == module.head.pooled_dim:
            self.classifier = classifier if classifier.out_features > 1 else None
        self.reason: str | None = None
        if self.classifier is None:
            self.reason = (
                f"{type(module.task).__name__} has no linear classifier of the pooled readout, so its prediction is no "
                "sum over prototypes."
            )

    def inputs(self, readout: ReadoutOutput) -> tuple[Tensor, Tensor | None]:
        """Tokens and mask at the head's input."""
        assert readout.inputs is not None
        return readout.inputs.float(), readout.mask

    def check(self, readout: ReadoutOutput, predicted: Tensor | None) -> bool:
        """True if the contributions to the predictions of a batch add up to what is predicted; else sets ``reason``."""
        return self._sums(readout, predicted) is not None

    def _sums(self, readout: ReadoutOutput, predicted: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Logits, their terms and what lower levels add to them; None, and a ``reason``, where these do not add up."""
        if self.reason is not None or self.classifier is None:
            return None
        name = type(self.head).__name__
        try:
            tokens, mask = self.inputs(readout)
            with torch.autocast(tokens.device.type, enabled=False):
                logits = readout_logits(self.head, self.classifier)(tokens, mask)
                terms, below = class_terms(self.head, tokens, mask, self.classifier)
        except ValueError as error:
            self.reason = str(error).partition(". ")[0].removesuffix(".") + "."
            return None
        bias = 0.0 if self.classifier.bias is None else self.classifier.bias
        total = terms.sum((1, 2, 3)) + bias + (0.0 if below is None else below)
        scale = 1.0 + float(logits.abs().max())
        chosen = None if predicted is None else logits.gather(1, predicted.to(logits.device).long().unsqueeze(1))
        if terms.shape[2:4] != self._shape:
            self.reason = f"The contributions of {name} are not by the prototypes that are shown here."
        elif float((total - logits).abs().max()) > TOLERANCE * scale:
            self.reason = f"The contributions of {name} do not add up to the logits, so they are not shown."
        elif chosen is not None and bool((chosen[:, 0] < logits.max(-1).values - 0.05 * scale).any()):
            self.reason = f"{type(self._module.task).__name__} predicts another class than its classifier's largest."
        return (logits, terms, below) if self.reason is None else None

    def __call__(self, readout: ReadoutOutput, summary: BatchSummary, batch: Batch, album: Album) -> Decision | None:
        """The decision about the only sample of a batch, or None where there are no exact contributions."""
        sums = None if summary.predicted is None else self._sums(readout, summary.predicted)
        if sums is None or summary.predicted is None or self.classifier is None:
            return None
        logits, all_terms, below = sums
        tokens, mask = self.inputs(readout)
        with torch.autocast(tokens.device.type, enabled=False):
            without = self.head.logits_without(tokens, mask, self.classifier)
        chosen = summary.predicted.to(logits.device).long()
        others = logits.scatter(1, chosen.unsqueeze(1), -torch.inf).argmax(1)
        terms = margins(all_terms, chosen, others)[0]
        valid = summary.mask[0].to(terms.device)
        terms = terms[valid] if len(valid) == len(terms) else terms
        bias = 0.0
        if self.classifier.bias is not None:
            bias = float(self.classifier.bias[chosen[0]] - self.classifier.bias[others[0]])
        weights = readout.token_weights
        learned = getattr(self.head, "token_weights", "uniform") != "uniform" and weights is not None
        places, grid = self._places(summary, batch, len(terms)) if len(terms) > 1 else ([], None)
        return Decision(
            predicted=album.class_name(int(chosen[0])) or str(int(chosen[0])),
            runner_up=album.class_name(int(others[0])) or str(int(others[0])),
            probability=float(logits.double().softmax(-1)[0, chosen[0]]),
            margin=float(margins(logits, chosen, others)[0]),
            bias=bias,
            terms=_numpy(terms),
            places=places,
            below=None if below is None else float(margins(below, chosen, others)[0]),
            without=None if without is None else _numpy(without.double().softmax(-1)[0, ..., chosen[0]]),
            weights=_numpy(weights[0][valid]) if learned and weights is not None and places else None,
            grid=grid,
        )

    def _places(
        self, summary: BatchSummary, batch: Batch, count: int
    ) -> tuple[list[Place], tuple[int, int, int] | None]:
        """Names of the valid tokens of the sample, and the grid of them."""
        backbone: Any = self._module.backbone
        if summary.spans is not None:
            spans = [span for span, valid in zip(summary.spans[0], summary.mask[0].tolist(), strict=True) if valid]
            names = getattr(backbone, "token_names", None)
            written = names(batch)[0] if names is not None else []
            if len(written) != count:
                written = ["special token" if end <= start else f"token {at}" for at, (start, end) in enumerate(spans)]
            return [Place(span, name) for span, name in zip(spans, written, strict=True)], None
        grid = getattr(backbone, "token_grid", lambda _: None)(batch)
        if grid is None or grid[0] + grid[1] * grid[2] != count or len(summary.mask[0]) != count:
            return [Place((0, 0), f"token {at}") for at in range(count)], None
        names = ["class token" if grid[0] == 1 else f"prefix {at}" for at in range(grid[0])]
        names += [f"row {row}, column {column}" for row in range(grid[1]) for column in range(grid[2])]
        return [Place((0, 0), name) for name in names], grid


@dataclass(frozen=True)
class Effects:
    """Means over inputs of what prototypes add to the classes, and of what is lost without them.

    Attributes:
        samples: Inputs.
        contributions: To the logit of each class less the mean logit over all classes, ``(H, K, C)`` float64.
        knock_out_samples: Inputs of which prototypes were taken out.
        knock_out: Fall of the probability of the predicted class without each prototype, ``(H, K)`` float64, NaN for
            the only prototype of a head; None where the head cannot say.
    """

    samples: int
    contributions: Tensor
    knock_out_samples: int
    knock_out: Tensor | None


@torch.no_grad()
def prototype_effects(
    head: Head, classifier: nn.Linear, samples: Sequence[tuple[Tensor, Tensor | None]]
) -> Effects | None:
    """Mean effects of every prototype, or None without samples.

    Args:
        head: With exact contributions, in evaluation mode.
        classifier: Reads ``pooled``.
        samples: Tokens ``(T, D)`` and mask ``(T,)`` of each, at the head's input.

    Raises:
        ValueError: If the head has no exact contributions.
    """
    total: Tensor | None = None
    falls: list[Tensor] = []
    most = len(samples)
    for start in range(0, len(samples), BATCH):
        tokens, mask = pad_samples(samples[start : start + BATCH])
        for row in range(len(tokens)):
            alone = (tokens[row : row + 1], None if mask is None else mask[row : row + 1])
            terms = class_terms(head, *alone, classifier)[0][0].double().sum(0).cpu()  # (H, K, C)
            total = terms if total is None else total + terms
        assert total is not None
        most = min(most, max(1, KNOCK_OUTS // (total.shape[0] * total.shape[1])))
        if start < most:
            count = most - start
            given = (tokens[:count], None if mask is None else mask[:count])
            without = head.logits_without(*given, classifier)
            if without is not None:
                whole = readout_logits(head, classifier)(*given).double().softmax(-1)
                probability, chosen = whole.max(-1)
                index = chosen[:, None, None, None].expand(*without.shape[:3], 1)
                rest = without.double().softmax(-1).gather(-1, index).squeeze(-1)
                falls.append((probability[:, None, None] - rest).cpu())
    if total is None:
        return None
    mean = total / len(samples)
    knock_out = torch.cat(falls).mean(0) if falls else None
    return Effects(len(samples), mean - mean.mean(-1, keepdim=True), sum(map(len, falls)), knock_out)


def _numpy(values: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.detach().double().cpu().numpy()
    return array
