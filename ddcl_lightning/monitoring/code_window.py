"""Statistics of a codebook over its latest tokens: additive, and of bounded size."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ddcl_lightning._utils.distributed import gather_objects, world_size
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.functional import code_counts, effective_number, effective_rank, nearest_codes, total_variance
from ddcl_lightning.monitoring.health_report import CodebookReport
from ddcl_lightning.monitoring.records import CodebookRecord

TOKENS_PER_CODE = 50  # a code without any of so many times K tokens is dead
SAMPLE = 2048  # tokens that are kept of each half of the window
SAMPLE_OF_CALL = 256  # of each call at most
ENOUGH = 1024  # tokens for a rank: with as many, the older half of the window is left out
MAX_COMPARED = 4096  # codes whose nearest other is looked for; of more codes every n-th


class _Half:
    """One half of the window: counts ``(H, K)``, and tokens ``(M, H, d + 1)`` whose last number is an error."""

    def __init__(self, counts: Tensor, seed: int) -> None:
        self.counts = counts
        self.num_tokens = 0
        self.sample = Reservoir(SAMPLE, seed)


class CodeWindow:
    """Counts and tokens of one codebook over its last ``size`` tokens, and as many before them at most.

    Args:
        record: The first record, for the sizes.
        tokens_per_pass: Tokens of a pass over the data on all processes together, or 0 where not known.
    """

    def __init__(self, record: CodebookRecord, tokens_per_pass: int = 0) -> None:
        self.num_heads, self.num_codes, self.geometry = record.num_heads, record.num_codes, record.geometry
        self.size = max(TOKENS_PER_CODE * self.num_codes, tokens_per_pass)
        self.codebook: Tensor | None = None
        self._non_finite = torch.zeros(record.num_heads, dtype=torch.int64)
        self._halves = [self._half(), self._half()]  # the older one first
        self._rows = np.random.default_rng(0)

    def _half(self) -> _Half:
        return _Half(torch.zeros(self.num_heads, self.num_codes, dtype=torch.int64), seed=0)

    def fits(self, record: CodebookRecord) -> bool:
        """True if a record is of a codebook of the same sizes."""
        return (record.num_heads, record.num_codes, record.geometry) == (self.num_heads, self.num_codes, self.geometry)

    @torch.no_grad()
    def add(self, record: CodebookRecord) -> None:
        """Add the record of a call. It waits for the device."""
        if record.codes is None:
            return
        wrong = (record.codes < -1) | (record.codes >= self.num_codes)
        codes = record.codes.masked_fill(wrong, -1)
        if record.mask is not None:
            codes = codes.masked_fill(~record.mask, -1)
        counts = code_counts(codes, self.num_codes).cpu()
        self._non_finite += wrong.sum(-1).cpu()
        half = self._halves[1]
        half.counts += counts
        half.num_tokens += int((codes >= 0).any(0).sum())
        self.codebook = record.codebook
        if record.tokens is not None:
            self._add_tokens(half.sample, record.tokens, codes)
        if half.num_tokens * world_size() >= self.size:
            self._halves = [half, self._half()]

    def _add_tokens(self, sample: Reservoir, tokens: Tensor, codes: Tensor) -> None:
        """Add a few valid tokens and the squared distances to their codes."""
        valid = (codes >= 0).any(0)
        finite = torch.isfinite(tokens).all(-1)
        self._non_finite += (~finite & valid).sum(-1).cpu()
        rows = torch.nonzero(valid & finite.all(0)).flatten().cpu().numpy()
        if len(rows) > SAMPLE_OF_CALL:
            rows = self._rows.choice(rows, SAMPLE_OF_CALL, replace=False)
        chosen = torch.from_numpy(rows).to(tokens.device)
        z, k = self._scaled(tokens[:, chosen]), codes[:, chosen]
        error = torch.full(z.shape[:2], math.nan, device=z.device)
        if self.codebook is not None:
            vectors = self._scaled(self.codebook).gather(1, k.clamp(min=0).unsqueeze(-1).expand_as(z))
            error = (z - vectors).square().sum(-1).masked_fill(k < 0, math.nan)
        sample.add(torch.cat([z, error.unsqueeze(-1)], -1).transpose(0, 1))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return normalize(vectors.float(), dim=-1) if self.geometry == "cosine" else vectors.float()

    @torch.no_grad()
    def report(self, duplicate_distance: float) -> list[CodebookReport]:
        """Health of each head, the same on every process; all have to call it."""
        halves = self._halves
        counts = torch.stack(gather_objects(halves[0].counts + halves[1].counts)).sum(0)
        num_tokens = sum(gather_objects(sum(half.num_tokens for half in halves)))
        older, newer = (_gather(half.sample) for half in halves)
        rows = [sample for sample in (older, newer) if sample is not None]
        if newer is not None and len(newer) >= ENOUGH:
            rows = [newer]
        non_finite = torch.stack(gather_objects(self._non_finite)).sum(0)
        books = None if self.codebook is None else self._scaled(self.codebook).cpu()
        reports = []
        for head in range(self.num_heads):
            counted = CodebookReport(
                num_codes=self.num_codes,
                num_tokens=num_tokens,
                usage=float((counts[head] > 0).double().mean()),
                perplexity=float(effective_number(counts[head])),
                dead=tuple(torch.nonzero(counts[head] == 0).flatten().tolist()) if num_tokens >= self.size else None,
                non_finite=int(non_finite[head]),
            )
            tokens = torch.cat(rows)[:, head].double() if rows else torch.empty(0, 1)
            reports.append(_add_codes(_add_sample(counted, tokens), tokens, books, head, duplicate_distance))
        return reports


def _add_sample(report: CodebookReport, rows: Tensor) -> CodebookReport:
    """A report with the values of tokens ``(M, d + 1)``, whose last number is their error."""
    if not len(rows):
        return report
    tokens, errors = rows[:, :-1], rows[:, -1]
    variance = float(total_variance(tokens))
    return replace(
        report,
        token_rank=float(effective_rank(tokens)),
        dim=tokens.shape[1],
        commitment=float(errors.nanmean()) / variance if variance > 0 else math.nan,
    )


def _add_codes(
    report: CodebookReport, rows: Tensor, books: Tensor | None, head: int, duplicate_distance: float
) -> CodebookReport:
    """A report with the values of the codes of one head."""
    if books is None:
        return report
    codes = books[head].double()
    finite = torch.nonzero(torch.isfinite(codes).all(-1)).flatten()
    report = replace(report, dim=codes.shape[1], non_finite=report.non_finite + len(codes) - len(finite))
    codes = codes[finite]
    if not len(codes):
        return report
    report = replace(report, code_rank=float(effective_rank(codes)))
    if len(codes) < 2:
        return report
    spread = float((total_variance(rows[:, :-1]) if len(rows) else codes.square().sum(-1).mean()).sqrt())
    step = math.ceil(len(codes) / MAX_COMPARED)
    distances, others = nearest_codes(codes, torch.arange(0, len(codes), step))
    first = int(distances.argmin())
    least = float(distances[first])
    pair = sorted((int(finite[first * step]), int(finite[others[first]])))
    close = float((distances <= duplicate_distance * spread).double().mean())
    return replace(
        report,
        separation=0.0 if least == 0 else least / spread if spread > 0 else math.nan,
        closest=(pair[0], pair[1]),
        duplicates=round(close * len(codes)),
    )


def _gather(sample: Reservoir) -> Tensor | None:
    """The sample of all processes, or None if it is empty on all of them."""
    return sample.gather() if any(gather_objects(sample.num_rows > 0)) else None
