"""Statistics of a codebook over its latest tokens: additive, and of bounded size."""

import math
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import gather_objects, world_size
from ddcl_lightning.functional import code_counts
from ddcl_lightning.monitoring.health_report import CodebookReport, report_of_codes, report_of_tokens
from ddcl_lightning.monitoring.records import BankRecord, CodebookRecord
from ddcl_lightning.monitoring.remedies import GENERIC
from ddcl_lightning.monitoring.scale_free import directions, lengths, power_of_two
from ddcl_lightning.monitoring.signals import read_signals

TOKENS_PER_CODE = 50  # a code without any of so many times K tokens is dead ...
PATIENCE = 20  # ... if it has waited so many times as long as it used to wait for one
SAMPLE = 2048  # latest tokens that are kept at least, over all processes


class CodeWindow:
    """Counts of one codebook over its last ``size`` tokens, and as many before them at most; and its latest tokens.

    Args:
        record: The first record, for the sizes.
        tokens_per_pass: Tokens of a pass over the data on all processes together, or 0 where not known.
    """

    def __init__(self, record: CodebookRecord, tokens_per_pass: int = 0) -> None:
        self.num_heads, self.num_codes, self.geometry = record.num_heads, record.num_codes, record.geometry
        self.size = max(TOKENS_PER_CODE * self.num_codes, tokens_per_pass)
        self.codebook: Tensor | None = None
        self._bank: BankRecord | None = None  # the last record of a bank, without its tokens
        self._counts = torch.zeros(2, self.num_heads, self.num_codes, dtype=torch.int64)  # the older half first
        self._num_tokens = [0, 0]
        self._hits = torch.zeros(self.num_heads, self.num_codes, dtype=torch.int64)  # of all tokens so far
        self._idle = torch.zeros_like(self._hits)  # tokens since the last one of a code
        self._non_finite = torch.zeros(self.num_heads, dtype=torch.int64)
        self._out_of_range = torch.zeros_like(self._non_finite)  # of these
        self._advice = record.advice
        self._sample: deque[Tensor] = deque()  # (M, H, d + 1) of each reading; the last number is a distance
        self._readings = 0
        self._quantizes = False

    def fits(self, record: CodebookRecord) -> bool:
        """True if a record is of a codebook of the same sizes, and its tokens are of the same dimension."""
        if self._sample and record.tokens is not None and record.tokens.shape[-1] != self._sample[-1].shape[-1] - 1:
            return False
        return (record.num_heads, record.num_codes, record.geometry) == (self.num_heads, self.num_codes, self.geometry)

    def lengthen(self, tokens: int) -> None:
        """Wait for so many tokens at least before codes are dead."""
        self.size = max(self.size, tokens)

    @torch.no_grad()
    def add(self, record: CodebookRecord) -> None:
        """Add the record of a call. It waits for the device."""
        codes = record.hard_codes()
        if codes is None:
            return
        self._quantizes = record.codes is not None
        wrong = (codes < -1) | (codes >= self.num_codes)
        codes = codes.masked_fill(wrong, -1)
        if record.mask is not None:
            codes = codes.masked_fill(~record.mask, -1)
        self._non_finite += wrong.sum(-1).cpu()
        self._out_of_range += wrong.sum(-1).cpu()
        self._advice = record.advice
        if self._num_tokens[1] * world_size() >= self.size:
            self._counts = torch.stack([self._counts[1], torch.zeros_like(self._counts[1])])
            self._num_tokens = [self._num_tokens[1], 0]
        counts = code_counts(codes, self.num_codes).cpu()
        number = int((codes >= 0).any(0).sum())
        self._counts[1] += counts
        self._num_tokens[1] += number
        self._hits += counts
        self._idle = torch.where(counts > 0, 0, self._idle + number)
        self._readings += 1
        self.codebook = None if record.codebook is None else record.codebook.detach()
        if record.tokens is not None:
            self._add_tokens(record.tokens, codes)
        if isinstance(record, BankRecord):
            self._bank = BankRecord.without_call(
                record.codebook[:, :0],
                record.codebook.cpu(),
                record.temperature.cpu(),
                detach_assignments=record.detach_assignments,
            )

    def _add_tokens(self, tokens: Tensor, codes: Tensor) -> None:
        """Add some valid tokens and the distances to their codes; the oldest that are not needed go."""
        valid = (codes >= 0).any(0)
        finite = torch.isfinite(tokens).all(-1)
        self._non_finite += (~finite & valid).sum(-1).cpu()
        rows = torch.nonzero(valid & finite.all(0)).flatten().cpu().numpy()
        enough = math.ceil(SAMPLE / world_size())
        if len(rows) > enough:  # of any place: every n-th token might be the same place of each sample
            rows = np.sort(np.random.default_rng(self._readings).choice(rows, enough, replace=False))
        if not len(rows):
            return
        chosen = torch.from_numpy(rows).to(tokens.device)
        z, k = self._scaled(tokens[:, chosen]), codes[:, chosen]
        distance = z.new_full(z.shape[:2], math.nan)
        if self.codebook is not None:
            vectors = self._scaled(self.codebook).gather(1, k.clamp(min=0).unsqueeze(-1).expand_as(z))
            distance = lengths(z - vectors).to(z.dtype).masked_fill(k < 0, math.nan)
        self._sample.append(torch.cat([z, distance.unsqueeze(-1)], -1).transpose(0, 1).cpu())
        while sum(map(len, self._sample)) - len(self._sample[0]) >= enough:
            self._sample.popleft()

    def _scaled(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return directions(vectors) if self.geometry == "cosine" else vectors

    @torch.no_grad()
    def report(self, duplicate_distance: float) -> list[CodebookReport]:
        """Health of each head, the same on every process; all have to call it."""
        fields = (self._counts, sum(self._num_tokens), self._non_finite, self._out_of_range, list(self._sample))
        counts, numbers, bad, wrong, samples = zip(*gather_objects(fields), strict=True)
        dead, num_tokens = self._dead(), sum(numbers)
        totals, non_finite = torch.stack(counts).sum((0, 1)), torch.stack(bad).sum(0)
        out_of_range = torch.stack(wrong).sum(0)
        rows = torch.cat([sample for each in samples for sample in each] or [torch.empty(0, self.num_heads, 1)])
        latest = [each[-1] for each in samples if each]
        books = None if self.codebook is None else self._scaled(self.codebook).cpu()
        banks = self._bank_signals(rows, torch.cat(latest)) if latest else None
        reports = []
        for head in range(self.num_heads):
            lost = dead[head] if num_tokens >= self.size else None
            report = CodebookReport.of_counts(totals[head], num_tokens, int(non_finite[head]), lost)
            sample = rows[:, head].double()
            unit = power_of_two(sample[:, :-1] if len(sample) or books is None else books[head])
            report = report_of_tokens(report, sample / unit)
            if books is not None:
                codes = books[head].double() / unit
                report = report_of_codes(report, sample[:, :-1] / unit, codes, duplicate_distance)
            report = replace(report, spread=report.spread * unit)
            if banks is not None:
                report = report.of_bank(banks[head])
            report = replace(report, out_of_range=int(out_of_range[head]), enough=self.size, advice=self._advice)
            reports.append(replace(report, quantizes=self._quantizes))
        return reports

    def _dead(self) -> Tensor:
        """Codes that have waited for a token too long, ``(H, K)`` boolean."""
        hits, idle = (torch.stack(values) for values in zip(*gather_objects((self._hits, self._idle)), strict=True))
        counted = sum(gather_objects(int(self._hits[0].sum())))
        waiting = idle.min(0).values * len(idle)  # the process that saw it last counts
        share = hits.sum(0) / (counted - waiting).clamp(min=1)
        patience: Tensor = (PATIENCE / share).nan_to_num(posinf=0.0).clamp(min=self.size)
        return waiting >= patience

    def _bank_signals(self, rows: Tensor, latest: Tensor) -> list[Any] | None:
        if self._bank is None or not bool(torch.isfinite(self._bank.codebook).all()):
            return None
        tokens = latest[..., :-1].transpose(0, 1)
        return list(read_signals(replace(self._bank, tokens=tokens), rows[..., :-1].transpose(0, 1)))

    def state_dict(self) -> dict[str, Any]:
        """State with which a resumed run reports as the uninterrupted one would: tensors and plain numbers."""
        return {
            "sizes": [self.num_heads, self.num_codes, self.size],
            "geometry": self.geometry,
            "counts": self._counts.clone(),
            "num_tokens": list(self._num_tokens),
            "hits": self._hits.clone(),
            "idle": self._idle.clone(),
            "non_finite": self._non_finite.clone(),
            "out_of_range": self._out_of_range.clone(),
            "sample": [rows.clone() for rows in self._sample],
            "distances": True,  # beside the tokens; before 0.2 their squares
            "readings": self._readings,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "CodeWindow":
        """The window of a saved state; codes and temperature come with the next record."""
        window = cls.__new__(cls)
        window.num_heads, window.num_codes, window.size = state["sizes"]
        window.geometry = state["geometry"]
        window.codebook, window._bank, window._quantizes, window._advice = None, None, False, GENERIC
        window._counts, window._num_tokens = state["counts"].clone(), list(state["num_tokens"])
        window._hits, window._idle = state["hits"].clone(), state["idle"].clone()
        window._non_finite, window._readings = state["non_finite"].clone(), state["readings"]
        window._out_of_range = state.get("out_of_range", torch.zeros_like(window._non_finite)).clone()
        window._sample = deque(rows.clone() for rows in state["sample"])
        if not state.get("distances"):
            for rows in window._sample:
                rows[..., -1].sqrt_()
        return window
