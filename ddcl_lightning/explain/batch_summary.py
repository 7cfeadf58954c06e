"""One batch through backbone, head and task, with everything that is to be told about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ddcl_lightning._utils.batch import Batch, size
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.explain.explanation import Span
from ddcl_lightning.functional import nearest_prototype, soft_assign
from ddcl_lightning.functional._common import mark_padding, masked_mean
from ddcl_lightning.heads.base import ReadoutOutput
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks


@dataclass(frozen=True)
class BatchSummary:
    """Results of a module on a batch; on the CPU except ``tokens``.

    Attributes:
        shares: Mean assignment of each sample, ``(B, H, K)`` float64.
        means: Mean valid token of each sample as the bank sees it, ``(B, H, d)`` float64.
        codes: Nearest prototype of each token, ``(B, T, H)``, -1 at padding.
        mask: ``(B, T)``, True for valid tokens.
        tokens: ``(H, B, T, d)``, as the bank saw them.
        prototypes: ``(H, K, d)``.
        temperature: ``(H,)``.
        predicted: Class of each sample ``(B,)``, or None.
        spans: Characters of each of the T tokens, by sample, ``(0, 0)`` where there are none; None where the backbone
            does not say.
    """

    shares: Tensor
    means: Tensor
    codes: Tensor
    mask: Tensor
    tokens: Tensor
    prototypes: Tensor
    temperature: Tensor
    predicted: Tensor | None
    spans: list[list[Span]] | None

    def token_weights(self, row: int) -> Tensor:
        """Assignments of the tokens of one sample, ``(H, T, K)`` float64 on the CPU."""
        return soft_assign(self.tokens[:, row].cpu().double(), self.prototypes.cpu().double(), self.temperature.cpu())

    def token_distances(self, row: int) -> Tensor:
        """Euclidean distances of the tokens of one sample, ``(H, T, K)`` float64 on the CPU."""
        return distances(self.tokens[:, row].cpu().double(), self.prototypes.cpu().double())


class Observer:
    """Function from batches to :class:`BatchSummary`, with a module in evaluation mode.

    Args:
        module: Its head's last bank is what counts.

    Attributes:
        bank: That bank.
        readout: Of the last batch.
        predicts: Whether the task predicted classes of the last batch.
        prototypes: As the last batch met them, ``(H, K, d)``.

    Raises:
        ValueError: If the head has no bank.
    """

    readout: ReadoutOutput
    predicts: bool = False
    prototypes: Tensor

    def __init__(self, module: DDCLReadoutModule) -> None:
        banks = find_banks(module.head)
        if not banks:
            raise ValueError(
                f"there is nothing to explain: the head {type(module.head).__name__} has no prototypes. Use a head "
                "with a prototype bank, such as DDCLReadout."
            )
        self._module = module
        self._name, self.bank = list(banks.items())[-1]
        self._records: dict[str, BankRecord] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager that records the bank, without gradients and in evaluation mode; modes are put back."""
        banks: dict[str, PrototypeBank] = {self._name: self.bank}
        with evaluating(self._module), torch.no_grad(), record_codebooks(banks, self._records.__setitem__):
            yield

    def __call__(self, batch: Batch) -> BatchSummary:
        """Run a batch, on the module's device."""
        self._records.clear()
        readout = self.readout = self._module(batch)
        previous, samples = self._records.get(self._name), size(batch)
        if previous is None:
            raise ValueError(
                f"the head {type(self._module.head).__name__} did not call its last prototype bank {self._name!r}. "
                "Call it as a module, bank(tokens, mask)."
            )
        if previous.tokens.shape[1] % samples:
            raise ValueError(
                f"the last prototype bank saw {previous.tokens.shape[1]} tokens for {samples} samples; they must be as "
                "many for each sample, padded and masked where need be."
            )
        heads = previous.tokens.reshape(previous.tokens.shape[0], samples, -1, previous.tokens.shape[2])
        length = heads.shape[2]
        mask = torch.ones(samples, length, dtype=torch.bool, device=heads.device)
        if previous.mask is not None:
            mask = previous.mask[0].reshape(samples, length)
        codes = nearest_prototype(previous.tokens, previous.codebook).T.reshape(samples, length, -1)
        predicted = _cpu(self._module.task.predict(readout, batch).get("predicted_class"))
        self.predicts, self.prototypes = predicted is not None, previous.codebook
        return BatchSummary(
            shares=self._shares(previous, readout.assignments, mask).double().cpu(),
            means=masked_mean(heads.movedim(0, 1), mask, dim=-2).double().cpu(),
            codes=mark_padding(codes, mask).cpu(),
            mask=mask.cpu(),
            tokens=heads,
            prototypes=previous.codebook,
            temperature=previous.temperature,
            predicted=predicted,
            spans=self._spans(batch, mask.cpu()),
        )

    def _shares(self, record: BankRecord, assignments: Tensor | None, mask: Tensor) -> Tensor:
        heads, prototypes = record.codebook.shape[:2]
        if assignments is not None and assignments.shape == (len(mask), heads, prototypes):
            return assignments
        weights = soft_assign(record.tokens, record.codebook, record.temperature)
        return masked_mean(weights.reshape(heads, *mask.shape, prototypes).movedim(0, 1), mask, dim=-2)

    def _spans(self, batch: Batch, mask: Tensor) -> list[list[Span]] | None:
        spans = getattr(self._module.backbone, "spans", None)
        if spans is None or not isinstance(batch, dict) or "text" not in batch:
            return None
        try:
            rows = spans(batch)
        except ValueError:  # a tokenizer that does not tell, or tokens that were pooled
            return None
        # A bank after a pooling sees other tokens than those of the text.
        if [len(row) for row in rows] != mask.sum(1).tolist():
            return None
        aligned: list[list[Span]] = [[(0, 0)] * mask.shape[1] for _ in rows]
        for row, valid, target in zip(rows, mask, aligned, strict=True):
            for place, (start, end) in zip(torch.nonzero(valid).flatten().tolist(), row, strict=True):
                target[place] = (int(start), int(end))
        return aligned


def distances(points: Tensor, prototypes: Tensor) -> Tensor:
    """Euclidean distances ``(..., N, K)``, by differences: nearest examples sit where the expanded square rounds."""
    return torch.cdist(points, prototypes, compute_mode="donot_use_mm_for_euclid_dist")


def real_tokens(spans: Sequence[Span]) -> list[int]:
    """Places of the tokens that stand for characters; special tokens do not."""
    return [place for place, (start, end) in enumerate(spans) if end > start]


def _cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().cpu()
