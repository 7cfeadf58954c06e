"""Signals are those of the bank that was observed."""

import math

import pytest
import torch
from tiny import absolute
from torch import Tensor

from ddcl_lightning import PrototypeBank
from ddcl_lightning.functional import critical_temperature, effective_dimension, separation, soft_assign, total_variance
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from ddcl_lightning.monitoring.signals import HeadSignals, read_signals


def look(bank: PrototypeBank, tokens: Tensor, mask: Tensor | None = None) -> CodebookRecord:
    records: list[CodebookRecord] = []
    with record_codebooks({"": bank}, lambda name, observed: records.append(observed)):
        bank(tokens, mask)
    return records[0]


@pytest.mark.parametrize("detach", [False, True])
def test_signals_of_every_head(detach: bool) -> None:
    bank = PrototypeBank(5, 3, num_heads=2, temperature=absolute([0.5, 2.0]), detach_assignments=detach)
    tokens, mask = torch.randn(4, 6, 6), torch.rand(4, 6) < 0.7
    observed = look(bank, tokens.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    for head, signals in enumerate(read_signals(observed)):
        valid, prototypes = tokens[mask][:, 3 * head : 3 * head + 3], bank.prototypes[head].detach()
        q, apart = soft_assign(valid, prototypes, signals.temperature), separation(prototypes)
        entropy = float(-(q * q.log()).sum(1).mean())
        scale = float(total_variance(valid).sqrt())
        critical = float(critical_temperature(valid, detach_assignments=detach))
        expected = {
            "delta_min": float(apart.minimum),
            "delta_mean": float(apart.mean),
            "delta_relative": float(apart.minimum) / scale,
            "embedding_scale": scale,
            "effective_dimension": float(effective_dimension(valid)),
            "temperature_ratio": [0.5, 2.0][head] / critical,
            "entropy": entropy,
            "entropy_ratio": entropy / math.log(5),
            "lyapunov": float(q.mul(torch.cdist(valid, prototypes).square()).sum(1).mean())
            - detach * signals.temperature * entropy,
            "used_in_batch": len(torch.cdist(valid, prototypes).argmin(1).unique()) / 5,
        }
        assert signals.scalars() == pytest.approx(expected, rel=1e-5)
        assert signals.closest == tuple(apart.closest.tolist())
        torch.testing.assert_close(signals.mass, q.mean(0))
        assert int(signals.counts.sum()) == int(mask.sum())
        assert signals.num_prototypes == 5


def test_recent_tokens_serve_scale_and_critical_temperature_only() -> None:
    bank, tokens = PrototypeBank(5, 3, temperature=absolute()), torch.randn(20, 3)
    observed = look(bank, tokens)
    (alone,), (steadier,) = read_signals(observed), read_signals(observed, recent_tokens=10 * tokens.unsqueeze(0))
    assert steadier.critical == pytest.approx(100 * alone.critical, rel=1e-5)
    assert steadier.scale == pytest.approx(10 * alone.scale, rel=1e-5)
    assert steadier.entropy == alone.entropy
    assert torch.equal(steadier.counts, alone.counts)


def test_one_prototype_and_tokens_without_variance() -> None:
    (signals,) = read_signals(look(PrototypeBank(1, 3), torch.ones(5, 3)))
    assert isinstance(signals, HeadSignals)
    assert signals.delta_min == math.inf
    assert math.isnan(signals.entropy_ratio)
    assert signals.critical == 0
    assert signals.temperature_ratio == math.inf
    assert math.isnan(signals.relative_separation)
