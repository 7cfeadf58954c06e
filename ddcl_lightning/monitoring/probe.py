"""A fixed probe of a model: whether its codes still tell the samples apart that they told apart at the start."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.distributed import gather_objects
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning._utils.random_state import random_states, set_random_states
from ddcl_lightning.functional import total_variance
from ddcl_lightning.monitoring.recording import record_codebooks
from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.scale_free import directions, lengths, power_of_two
from ddcl_lightning.monitoring.sources.finding import Recordable

MAX_TOKENS = 4096  # of each codebook
ROUNDING = 1e-4  # mean squared difference, relative to the tokens, that is one of half precision
LATER_LEVEL = re.compile(r"\blevel[1-9]\d*$")  # in the names of find_codebooks


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a codebook in a probe, after the calls of the levels whose residual it got."""

    name: str
    record: CodebookRecord
    before: "tuple[_Call, ...]"

    @property
    def levels(self) -> "tuple[_Call, ...]":
        """All levels up to this one."""
        return (*self.before, self)


class Probe:
    """Share of the variance of a probe's FIRST embeddings that the codes of now explain, adjusted for their number.

    The embeddings that count are those of the first reading, whatever the encoder becomes: where they had a meaning, a
    collapse of tokens or codes shows as a loss of it. Of codes at random the share is 0.

    What a level of a residual quantizer gets depends on the codes before it, so that its own first residuals say
    nothing later. Its share is what the codes of all levels up to it explain of the first level's first embeddings;
    unknown where a level gets something else than the residual itself, such as a projection of it.

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
        calls: list[_Call] = []
        recorder = record_codebooks(self._codebooks, lambda name, record: calls.append(_after(calls, name, record)))
        with recorder.alone(), evaluating(self._model), torch.no_grad(), self._unchanged():
            self._forward()
        own: dict[str, list[_Call]] = {}
        for call in calls:
            own.setdefault(call.name, []).append(call)
        for name, called in own.items():
            self._first.setdefault(name, _rows([call for call in called if not call.before] or called)[0])
        values = {name: self._explained(name, called) for name, called in own.items()}
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

    def _explained(self, name: str, called: list[_Call]) -> list[float]:
        earlier = {level for call in called for level in call.before}
        last = [call.levels for call in called if call not in earlier]  # of one that is called for several levels
        unknown = [math.nan] * called[0].record.num_heads
        if len({len(levels) for levels in last}) > 1 or (len(last[0]) == 1 and LATER_LEVEL.search(name)):
            return unknown
        first = self._first[last[0][0].name]
        codes = [_rows(level)[1] for level in zip(*last, strict=True)]
        if any(first.shape[:2] != level.shape for level in codes):  # other heads or samples: nothing to compare
            return unknown
        num_codes = max(level.record.num_codes for level in last[0])
        return [explained_by_levels(tokens, columns, num_codes) for tokens, *columns in zip(first, *codes, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """The first embeddings, by codebook."""
        return {name: first.clone() for name, first in self._first.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the first embeddings."""
        self._first = {name: first.clone() for name, first in state.items()}


def _after(calls: list[_Call], name: str, record: CodebookRecord) -> _Call:
    """The next of some calls; of a level, if its tokens are what the codes of the call before left of its own."""
    is_level = bool(calls) and _is_residual(record, calls[-1].record)
    return _Call(name, record, calls[-1].levels if is_level else ())


def _is_residual(record: CodebookRecord, previous: CodebookRecord) -> bool:
    codes, codebook = previous.hard_codes(), previous.codebook
    if record.tokens is None or previous.tokens is None or codebook is None or codes is None:
        return False
    if record.tokens.shape != previous.tokens.shape:
        return False
    z, rest = _at_least_float32(previous.tokens), _at_least_float32(record.tokens)
    vectors = _at_least_float32(codebook).gather(1, codes.clamp(min=0).unsqueeze(-1).expand_as(z))
    valid = codes >= 0
    size, difference = (lengths(lengths(each)[valid]) for each in (z, z - vectors - rest))
    return bool(difference <= math.sqrt(ROUNDING) * size)


def _rows(calls: Sequence[_Call]) -> tuple[Tensor, Tensor]:
    """Valid tokens ``(H, N, d)`` of some calls and their codes ``(H, N)`` on the CPU, at most 4,096."""
    tokens, codes = zip(*(_rows_of(call.record) for call in calls), strict=True)
    return torch.cat(tokens, 1)[:, :MAX_TOKENS].clone(), torch.cat(codes, 1)[:, :MAX_TOKENS]


def _rows_of(record: CodebookRecord) -> tuple[Tensor, Tensor]:
    """Valid tokens ``(H, N, d)`` and their codes ``(H, N)`` on the CPU; no tokens where they are not known."""
    codes = record.hard_codes()
    heads = record.num_heads
    if codes is None or record.tokens is None:
        return torch.empty(heads, 0, 1), torch.empty(heads, 0, dtype=torch.int64)
    tokens = _at_least_float32(record.valid_tokens())
    tokens = directions(tokens) if record.geometry == "cosine" else tokens
    return tokens.cpu(), (codes if record.mask is None else codes[:, record.mask[0]]).cpu()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def explained_by_levels(tokens: Tensor, codes: Sequence[Tensor], num_codes: int) -> float:
    """Share of the variance of tokens that the codes of several levels explain, one after the other.

    Each level explains a share (:func:`explained_variance`) of what the mean tokens of the codes before it leave.

    Args:
        tokens: ``(N, d)``, finite.
        codes: ``(N,)`` int64 of each level.
        num_codes: K.

    Returns:
        As of :func:`explained_variance`.
    """
    rest, left = tokens.double() / power_of_two(tokens), 1.0
    for level in codes:
        left *= 1 - explained_variance(rest, level, num_codes)
        if not left > 0:
            break
        index = level.clamp(0, num_codes - 1)
        valid = (level == index) & torch.isfinite(rest).all(-1)
        sums = rest.new_zeros(num_codes, rest.shape[1]).index_add_(0, index[valid], rest[valid])
        means = sums / torch.bincount(index[valid], minlength=num_codes).clamp(min=1).unsqueeze(-1)
        rest = (rest - means[index]).masked_fill(~valid.unsqueeze(-1), math.nan)
    return 1 - left


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
