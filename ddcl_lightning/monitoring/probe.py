"""A fixed probe of a model: whether its codes still tell the samples apart that they told apart at the start."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning._utils.random_state import random_states, set_random_states
from ddcl_lightning.functional import total_variance
from ddcl_lightning.monitoring.recording import record_codebooks
from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.sources.finding import Recordable

MAX_TOKENS = 4096  # of each codebook


class Probe:
    """Share of the variance of a probe's FIRST embeddings that the codes of now explain, adjusted for their number.

    The embeddings that count are those of the first reading, whatever the encoder becomes: where they had a meaning, a
    collapse of tokens or codes shows as a loss of it. Of codes at random the share is 0.

    Args:
        model: The model that is called, in evaluation mode and without gradients.
        codebooks: Its codebooks by name.
        forward: Calls the model with the samples of the probe, always the same.
    """

    def __init__(self, model: nn.Module, codebooks: Mapping[str, Recordable], forward: Callable[[], Any]) -> None:
        self._model, self._codebooks, self._forward = model, dict(codebooks), forward
        self._first: dict[str, Tensor] = {}  # (H, N, d)

    def read(self) -> dict[str, list[float]]:
        """Share of each head, by codebook; all processes have to call it, and get the mean of their own probes."""
        records: dict[str, list[CodebookRecord]] = {}
        recorder = record_codebooks(self._codebooks, lambda name, record: records.setdefault(name, []).append(record))
        with recorder.alone(), evaluating(self._model), torch.no_grad(), self._unchanged():
            self._forward()
        values = {name: self._explained(name, called) for name, called in records.items()}
        everywhere = gather_objects(values)
        return {
            name: torch.tensor([each[name] for each in everywhere], dtype=torch.float64).nanmean(0).tolist()
            for name in values
            if all(len(each.get(name, ())) == len(values[name]) for each in everywhere)
        }

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Context manager in which everything draws the same numbers each time; what the model has is put back.

        That are its buffers, and codes, which some modules set in their first call.
        """
        device = next((tensor.device for tensor in self._model.parameters()), torch.device("cpu"))
        state = random_states(device)
        books = [book if isinstance(book, nn.Module) else book.module for book in self._codebooks.values()]
        kept = [(child, *pair) for child in self._model.modules() for pair in child.named_buffers(recurse=False)]
        kept += [(book, *pair) for book in books for pair in book.named_parameters(recurse=False)]
        values = [tensor.detach().clone() for *_, tensor in kept]
        torch.manual_seed(0)
        try:
            yield
        finally:
            set_random_states(state, device)
            for (child, name, tensor), value in zip(kept, values, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                if getattr(child, name) is not tensor:
                    setattr(child, name, tensor)

    def _explained(self, name: str, called: list[CodebookRecord]) -> list[float]:
        tokens, codes = zip(*(_rows(record) for record in called), strict=True)
        z, k = torch.cat(tokens, 1)[:, :MAX_TOKENS], torch.cat(codes, 1)[:, :MAX_TOKENS]
        first = self._first.setdefault(name, z.clone())
        if first.shape[:2] != k.shape:  # other heads or samples: nothing to compare
            return [math.nan] * len(k)
        return [explained_variance(f, c, called[0].num_codes) for f, c in zip(first, k, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """The first embeddings, by codebook."""
        return {name: first.clone() for name, first in self._first.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the first embeddings."""
        self._first = {name: first.clone() for name, first in state.items()}


def _rows(record: CodebookRecord) -> tuple[Tensor, Tensor]:
    """Valid tokens ``(H, N, d)`` and their codes ``(H, N)`` on the CPU; no tokens where they are not known."""
    codes = record.hard_codes()
    heads = record.num_heads
    if codes is None or record.tokens is None:
        return torch.empty(heads, 0, 1), torch.empty(heads, 0, dtype=torch.int64)
    tokens = record.valid_tokens().float()
    tokens = normalize(tokens, dim=-1) if record.geometry == "cosine" else tokens
    return tokens.cpu(), (codes if record.mask is None else codes[:, record.mask[0]]).cpu()


def explained_variance(tokens: Tensor, codes: Tensor, num_codes: int) -> float:
    """Share of the variance of tokens that their codes explain, adjusted for the number of codes (adjusted R squared).

    Args:
        tokens: ``(N, d)``, finite.
        codes: ``(N,)`` int64 in [0, K); tokens of other codes are left out.
        num_codes: K.

    Returns:
        At most 1, and 0 on average for codes at random; NaN without variance, or with hardly more tokens than codes.
    """
    valid = (codes >= 0) & (codes < num_codes) & torch.isfinite(tokens).all(-1)
    z, k = tokens[valid].double(), codes[valid]
    used, k = torch.unique(k, return_inverse=True)
    number, size = len(z), len(used)
    if number <= size:
        return math.nan
    total = float(total_variance(z)) * number
    if not total > 0:
        return math.nan
    z = z - z.mean(0)
    sums = z.new_zeros(size, z.shape[1]).index_add_(0, k, z)
    between = float((sums.square().sum(-1) / torch.bincount(k, minlength=size)).sum())
    return 1 - (1 - between / total) * (number - 1) / (number - size)
