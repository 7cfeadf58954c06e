"""The float64 decomposition is right, and comparing with it catches what can go wrong in a layer."""

import pytest
import torch
from torch import Tensor

from ddcl_lightning.callbacks.decomposition_check import find_violations
from ddcl_lightning.functional import (
    Decomposition,
    decompose,
    decomposition_errors,
    prototype_attention,
    prototype_attention_reference,
    soft_assign,
)

T = 0.7


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (2, 50, 4) with junk in the padding, prototypes (2, 6, 4) and mask (2, 50), float32."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 50, generator=g) < 0.6
    tokens = torch.randn(2, 50, 4, generator=g).masked_fill(~mask.unsqueeze(-1), 5.0)
    return tokens, torch.randn(2, 6, 4, generator=g), mask


def violations(problem: tuple[Tensor, Tensor, Tensor], trained: Decomposition, weights: Tensor | None = None) -> str:
    tokens, prototypes, mask = problem
    errors = decomposition_errors(tokens, prototypes, T, trained, mask, weights=weights)
    return "; ".join(find_violations(errors, trained.loss.dtype))


def test_equals_the_definition_token_by_token(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = (x.double() if x.is_floating_point() else x for x in problem)
    terms = decompose(tokens, prototypes, T, mask)
    for head in range(2):
        sums = torch.zeros(3, dtype=torch.float64)
        for z in tokens[head][mask[head]]:
            distances = torch.stack([(z - p).dot(z - p) for p in prototypes[head]])
            q = torch.exp(-distances / T) / torch.exp(-distances / T).sum()
            c = sum(weight * p for weight, p in zip(q, prototypes[head], strict=True))
            spread = torch.stack([(p - c).dot(p - c) for p in prototypes[head]])
            sums += torch.stack([(q * distances).sum(), (z - c).dot(z - c), (q * spread).sum()])
        torch.testing.assert_close(torch.stack(terms)[:, head], sums / mask[head].sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.loss, terms.ols + terms.variance, rtol=1e-13, atol=0)


def test_streams_over_tokens(problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, prototypes, mask = problem
    whole = decompose(tokens, prototypes, T, mask, weights=soft_assign(tokens, prototypes, T))
    monkeypatch.setattr("ddcl_lightning.functional._common.CHUNK_ELEMENTS", 40)
    streamed = decompose(tokens, prototypes, T, mask, weights=soft_assign(tokens, prototypes, T))
    torch.testing.assert_close(tuple(streamed), tuple(whole), rtol=1e-13, atol=0)


def test_terms_of_somebody_elses_assignments(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    one_hot = torch.nn.functional.one_hot(torch.full((2, 50), 3), 6).float()
    terms = decompose(tokens, prototypes, T, mask, weights=one_hot.masked_fill(~mask.unsqueeze(-1), torch.nan))
    for head in range(2):
        expected = (tokens[head][mask[head]] - prototypes[head, 3]).double().square().sum(-1).mean()
        torch.testing.assert_close(terms.loss[head], expected)
        assert terms.variance[head] == 0


@pytest.mark.parametrize("attend", [prototype_attention, prototype_attention_reference])
def test_healthy_terms_pass(problem: tuple[Tensor, Tensor, Tensor], attend: object) -> None:
    tokens, prototypes, mask = problem
    output = attend(tokens, prototypes, T, mask)  # type: ignore[operator]
    assert violations(problem, output.terms) == ""
    exact = tokens.double(), prototypes.double(), mask
    output = attend(exact[0], exact[1], T, mask)  # type: ignore[operator]
    assert violations(exact, output.terms, output.weights) == ""


def test_catches_a_wrong_temperature(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    wrong = prototype_attention(tokens, prototypes, 1.01 * T, mask).terms
    messages = violations(problem, wrong)
    assert "L_q against" in messages
    assert "L_OLS against" in messages
    assert "V against" in messages


def test_catches_a_wrong_temperature_of_one_head(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    wrong = prototype_attention(tokens, prototypes, torch.tensor([T, 1.01 * T]), mask).terms
    assert "L_q against" in violations(problem, wrong)


def test_catches_padding_in_the_mean(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    leaked = mask.clone()
    leaked[1, (~mask[1]).nonzero()[0]] = True  # a single padded token of one head
    assert "L_q against" in violations(problem, prototype_attention(tokens, prototypes, T, leaked).terms)
    # Padding that is zero, and a sum divided by the number of all tokens:
    zeroed = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
    assert "L_OLS against" in violations(problem, prototype_attention(zeroed, prototypes, T).terms)


def test_catches_rows_that_do_not_sum_to_one(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    healthy = prototype_attention_reference(tokens, prototypes, T, mask)
    assert healthy.weights is not None
    messages = violations(problem, healthy.terms, 1.001 * healthy.weights)
    assert "|sum_k q - 1|" in messages
    assert "|L_q - (L_OLS + V)|" in messages
    # and where the layer does not return its assignments:
    q = 1.001 * soft_assign(tokens, prototypes, T).double()
    wrong = decompose(tokens, prototypes, T, mask, weights=q)
    assert "against the trained value" in violations(problem, Decomposition(*(x.float() for x in wrong)))


def test_catches_a_variance_around_the_wrong_centre(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    healthy = prototype_attention_reference(tokens, prototypes, T, mask)
    assert healthy.weights is not None
    around_mean = (prototypes - prototypes.mean(1, keepdim=True)).square().sum(-1)
    variance = (healthy.weights @ around_mean.unsqueeze(-1)).sum((1, 2)) / mask.sum(1)
    messages = violations(problem, healthy.terms._replace(variance=variance))
    assert "V against" in messages
    assert "L_OLS" not in messages.replace("(L_OLS + V)", "")


def test_catches_a_variance_made_up_from_a_wrong_loss(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, prototypes, mask = problem
    healthy = prototype_attention(tokens, prototypes, T, mask).terms
    # L_q = L_OLS + V holds here by construction, which is why it is not what is checked.
    wrong = healthy._replace(loss=1.001 * healthy.loss, variance=1.001 * healthy.loss - healthy.ols)
    assert "L_q against" in violations(problem, wrong)


@pytest.mark.parametrize("term", ["loss", "ols", "variance"])
def test_catches_a_nan(problem: tuple[Tensor, Tensor, Tensor], term: str) -> None:
    tokens, prototypes, mask = problem
    healthy = prototype_attention(tokens, prototypes, T, mask).terms
    value = getattr(healthy, term).clone()
    value[1] = torch.nan
    assert "nan" in violations(problem, healthy._replace(**{term: value}))
    tokens[0, mask[0].nonzero()[0]] = torch.nan
    assert "nan" in violations(problem, healthy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_false_alarm_on_random_problems(dtype: torch.dtype) -> None:
    """960 problems per precision: shapes, masks with NaN behind them, scales 1e-3 to 1e3, temperatures 1e-4 to 1e4.

    Largest relative errors of L_q over 38,400 such problems: 6e-16 in float64, 3e-7 otherwise.
    """
    g = torch.Generator().manual_seed(0)

    def size(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (), generator=g))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def log_uniform(low: float, high: float) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(64, 1, 1, generator=g, dtype=torch.float64))

    for trial in range(15):
        n, k, d = size(40), size(40), size(33)
        scale, shift = log_uniform(-3, 3), (trial % 3) * normal(64, 1, d)
        z, p = (normal(64, n, d) + shift) * scale, (normal(64, k, d) * log_uniform(-2, 1) + shift) * scale
        if trial % 5 == 0:  # tokens on prototypes
            p[:, : min(n, k)] = z[:, : min(n, k)]
        z, p, temperature = (
            z.to(dtype),
            p.to(dtype),
            log_uniform(-4, 4).flatten().to(torch.promote_types(dtype, torch.float32)),
        )
        mask = torch.rand(64, n, generator=g) < 0.7
        mask[:, 0] = True
        z = z.masked_fill(~mask.unsqueeze(-1), torch.nan)
        attend = prototype_attention_reference if trial % 2 else prototype_attention
        terms = attend(z, p, temperature, mask).terms
        for i in range(64):
            single = Decomposition(*(term[i] for term in terms))
            errors = decomposition_errors(z[i], p[i], float(temperature[i]), single, mask[i])
            assert find_violations(errors, single.loss.dtype) == [], (
                trial,
                i,
                n,
                k,
                d,
                scale[i],
                temperature[i],
                errors,
            )


def test_errors_are_measured_on_the_scale_that_rounds() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    terms = decompose(z, z, 0.01)  # tokens on their prototypes: L_q is 0, the energy is 2
    errors = decomposition_errors(z, z, 0.01, Decomposition(terms.loss + 0.02, terms.ols, terms.variance))
    assert errors.energy == pytest.approx(2.0)
    assert errors.sharpness == pytest.approx(200.0)
    assert errors.loss == pytest.approx(0.01)
    assert errors.rows == pytest.approx(0.0, abs=1e-15)
