"""Codes that move inside of a quantizer, at the step of an optimizer of anything."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddcl_lightning import (
    CodebookMetrics,
    CodeUpdate,
    ResidualVectorQuantizer,
    SoftVectorQuantizer,
    Temperature,
    TokenNormalized,
)
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.nn.moving_bank import CALLS_WITHOUT_STEP
from tests.processes import results_of_processes

DIM, CODES = 4, 8


class Model(nn.Module):
    """An autoencoder of tokens."""

    def __init__(self, scale: float = 1.0, **kwargs: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, DIM, bias=False), nn.Linear(DIM, 6)
        self.vq = SoftVectorQuantizer(DIM, CODES, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            self.encoder.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, terms = self.vq(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + terms


def batch(number: int, size: int = 64) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(number))


def step(model: Model, optimizer: torch.optim.Optimizer, number: int, *, size: int = 64) -> float:
    loss = model(batch(number, size))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def started(**kwargs: object) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(**kwargs)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    step(model, optimizer, 0)
    return model, optimizer


def test_one_line_and_adam_train_with_all_codes() -> None:
    model, optimizer = started()
    first = step(model, optimizer, 1)
    for number in range(2, 200):
        last = step(model, optimizer, number)
    assert last < 0.8 * first
    metrics = CodebookMetrics(CODES)
    metrics.update(model.vq.eval()(model.encoder(batch(1000, 512))).indices)
    assert float(metrics.compute()["usage"]) == 1
    assert float(metrics.compute()["perplexity"]) > 0.6 * CODES


def test_codes_move_at_the_step_and_at_no_other_time() -> None:
    model, optimizer = started()
    before = model.vq.codebook.clone()
    outputs = [model.vq(model.encoder(batch(1))).quantized for _ in range(2)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    outputs[0].sum().backward()
    assert torch.equal(model.vq.codebook, before)
    optimizer.step()
    assert not torch.equal(model.vq.codebook, before)


def test_codes_take_the_token_normalized_step() -> None:
    """As an optimizer of that kind moves them."""
    settings = {"step_size": 0.3, "relocation_threshold": 0.5, "load_exponent": 0.5}
    temperature = Temperature(0.4, "absolute")
    inside = SoftVectorQuantizer(DIM, CODES, code_update=CodeUpdate(**settings), temperature=temperature)
    outside = SoftVectorQuantizer(DIM, CODES, code_update="optimizer", temperature=temperature)
    codes = torch.randn(1, CODES, DIM)
    for vq in (inside, outside):
        vq.bank.set_prototypes(codes)
    follows = TokenNormalized([outside.bank.prototypes], lr=0.3, relocation_threshold=0.5, load_exponent=0.5).watch(
        outside
    )
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for number in range(4):
        z = torch.randn(50, DIM, generator=torch.Generator().manual_seed(number))
        inside(z).quantized.sum().backward()
        other.step()
        outside(z).quantized.sum().backward()
        follows.step()
        follows.zero_grad()
        inside.zero_grad()
        torch.testing.assert_close(inside.codebook, outside.codebook)


def far() -> Tensor:
    return 50 * batch(50)


def skipped_by_zero_grad(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model(far()).backward()
    optimizer.zero_grad()


def skipped_for_its_small_loss(model: Model, optimizer: torch.optim.Optimizer) -> None:
    (1e-6 * model(far())).backward()
    optimizer.zero_grad()


def without_gradients(model: Model, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model(far())


def without_backward(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model(far())


def in_evaluation(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model.eval()
    model(far()).backward()
    model.train()
    optimizer.zero_grad()


def in_a_copy(model: Model, optimizer: torch.optim.Optimizer) -> None:
    copy.deepcopy(model)(far()).backward()


def encoded(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model.vq.encode(model.encoder(far()))


def while_frozen(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model.vq.requires_grad_(False)
    with torch.no_grad():
        model(far())
    model.vq.requires_grad_(True)


TEMPERATURES = [None, 0.1, Temperature(0.1, "initial"), Temperature(0.5, "absolute")]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "passes",
    [
        skipped_by_zero_grad,
        skipped_for_its_small_loss,
        without_gradients,
        without_backward,
        in_evaluation,
        in_a_copy,
        encoded,
        while_frozen,
    ],
)
def test_passes_without_a_step_of_their_own_change_nothing(passes: Callable[..., None], temperature: Any) -> None:
    """Neither codes, nor the temperature, the weight of the commitment or the looks after 1, 2, 4, ... steps."""
    results = []
    for extra in (False, True):
        model, optimizer = started(temperature=temperature)
        for number in range(1, 6):
            if extra:
                passes(model, optimizer)
            step(model, optimizer, number)
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "passes", [skipped_by_zero_grad, skipped_for_its_small_loss, without_gradients, without_backward, while_frozen]
)
@pytest.mark.parametrize("size", [CODES, 64])
def test_codes_start_on_the_tokens_of_steps(passes: Callable[..., None], size: int) -> None:
    """Whatever is seen before them, and also before the tokens are enough."""
    errors = []
    for extra in (False, True):
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for number in range(20):
            if extra:
                passes(model, optimizer)
            step(model, optimizer, number, size=size)
        z = model.encoder(batch(99, 512)).detach()
        errors.append(float((model.vq.eval()(z).quantized - z).square().mean()))
        assert float(model.vq.codebook.abs().max()) < 4 * float(z.abs().max())
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("kind", ["plain", "residual", "frozen"])
def test_batches_skipped_by_an_optimizer_of_the_encoder_alone_change_nothing(kind: str) -> None:
    """Its ``zero_grad`` leaves the quantizer's own gradients; also what the commitment measures of frozen codes."""
    results = []
    for extra in (False, True):
        model, _ = started()
        if kind == "residual":
            model.vq = ResidualVectorQuantizer(DIM, CODES, 2)
        optimizer = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=1e-3)
        for number in range(6):
            if kind == "frozen" and number == 2:
                model.vq.requires_grad_(False)
            if extra and number:
                for _ in range(2):
                    model(far()).backward()
                    optimizer.zero_grad()
            step(model, optimizer, number)
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_codes_that_a_pass_without_gradients_has_started_start_again_in_the_first_call_with_them() -> None:
    results = []
    for extra in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if extra is not torch.enable_grad:
            with extra():
                model(far())
        for number in range(4):
            step(model, optimizer, number)
        results.append(model.state_dict())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_states_that_were_loaded_in_inference_mode_train(temperature: Any) -> None:
    model, optimizer = started(temperature=temperature)
    with torch.inference_mode():
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    step(model, optimizer, 1)
    assert bool(torch.isfinite(model.vq.codebook).all())


def test_passes_without_a_step_leave_residual_codes_alone() -> None:
    results = []
    for extra in (False, True):
        torch.manual_seed(0)
        rvq = ResidualVectorQuantizer(6, CODES, 3)
        optimizer = torch.optim.SGD(rvq.parameters(), lr=0.1)
        for number in range(20):
            if extra and number:
                rvq(far().requires_grad_()).quantized.square().sum().backward()
                optimizer.zero_grad()
            rvq(batch(number).requires_grad_()).quantized.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(rvq.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_accumulated_batches_move_codes_like_the_joint_one(temperature: Any) -> None:
    results = []
    for number in (1, 4):
        model, optimizer = started(temperature=temperature)
        optimizer.zero_grad()
        for chunk in batch(1, 64).chunk(number):
            (model(chunk) / number).backward()
        optimizer.step()
        results.append([model.vq.codebook.clone(), model.vq.bank.temperature])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_activation_checkpointing_counts_tokens_once(reentrant: bool, weight: float) -> None:
    results = []
    for checkpointed in (False, True):
        model, optimizer = started(temperature=Temperature(0.5, "absolute"), commitment_weight=weight)
        z = model.encoder(batch(1))

        def run(z: Tensor, vq: SoftVectorQuantizer = model.vq) -> Tensor:
            output = vq(z)
            return output.quantized + output.terms.loss

        quantized = checkpoint(run, z, use_reentrant=reentrant) if checkpointed else run(z)
        (model.decoder(quantized) - batch(1)).square().mean().backward()
        optimizer.step()
        results.append(torch.cat([model.vq.codebook.flatten(), model.vq.bank.loads.flatten()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [True, False])
def test_codes_start_under_activation_checkpointing_as_without_it(reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(4):
            x = batch(number).requires_grad_()
            loss = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(model.state_dict())
    torch.testing.assert_close(*results)


def test_frozen_codes_stay() -> None:
    for freeze in (
        lambda model: model.vq.requires_grad_(False),
        lambda model: model.vq.bank.requires_grad_(False),
        lambda model: model.vq.eval(),
    ):
        model, optimizer = started()
        before = model.vq.codebook.clone()
        freeze(model)
        for number in range(3):
            step(model, optimizer, number)
        assert torch.equal(model.vq.codebook, before)
        model.vq.requires_grad_(True).train()
        step(model, optimizer, 4)
        assert not torch.equal(model.vq.codebook, before)


def test_a_decoder_alone_can_be_trained() -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.decoder.parameters())
    model.encoder.requires_grad_(False)
    step(model, optimizer, 0)
    before = model.vq.codebook.clone()
    step(model, optimizer, 1)
    assert not torch.equal(model.vq.codebook, before)


def test_a_codebook_alone_can_be_fitted() -> None:
    """By an optimizer that has nothing else, and by settle() without one."""
    for without in (False, True):
        torch.manual_seed(0)
        vq = SoftVectorQuantizer(DIM, CODES)
        optimizer = torch.optim.Adam(vq.parameters())
        z = torch.randn(256, DIM)
        errors = []
        for _ in range(20):
            terms = vq(z).terms
            errors.append(float(terms.decomposition.loss.detach().sum()))
            if without:
                vq.settle()
            else:
                optimizer.zero_grad()
                terms.loss.backward()
                optimizer.step()
        assert errors[-1] < errors[1]


def test_a_loop_in_which_nothing_steps_is_told() -> None:
    vq = SoftVectorQuantizer(DIM, CODES)
    z = torch.randn(64, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(CALLS_WITHOUT_STEP - 1):
            vq(z)
    with pytest.warns(UserWarning, match="codes have not moved in 1000 calls in training mode.*settle"):
        vq(z)


def test_codes_start_on_the_first_tokens_however_few() -> None:
    """Collected over several batches if one is too small, and identical or constant tokens are no error."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    sizes = []
    while not bool(model.vq.bank.initialized):
        step(model, optimizer, len(sizes), size=5)
        sizes.append(5)
    assert sum(sizes) == 35  # four tokens per code
    for tokens in (torch.zeros(64, DIM), torch.ones(3, DIM).repeat(20, 1), torch.full((64, DIM), 1e-4)):
        vq = SoftVectorQuantizer(DIM, CODES)
        assert torch.isfinite(vq(tokens).quantized).all()
        torch.testing.assert_close(vq(tokens).quantized, tokens, rtol=1e-2, atol=1e-2)


def test_a_start_is_the_k_means_of_the_batch() -> None:
    torch.manual_seed(0)
    centers = 10 * torch.randn(CODES, DIM)
    z = centers.repeat(20, 1) + 0.01 * torch.randn(20 * CODES, DIM)
    vq = SoftVectorQuantizer(DIM, CODES)
    output = vq(z)
    assert len(output.indices.unique()) == CODES
    assert float((output.quantized - z).detach().square().mean()) < 1e-3


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_size_of_tokens_does_not_matter(scale: float) -> None:
    """Codes and their use are those of tokens of any other size."""
    results = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        vq = SoftVectorQuantizer(DIM, CODES)
        optimizer = torch.optim.SGD(vq.parameters(), lr=1.0)
        for number in range(10):
            z = factor * torch.randn(100, DIM, generator=torch.Generator().manual_seed(number))
            vq(z).terms.loss.backward()
            optimizer.step()
        results.append(vq.codebook / factor)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_half_precision_models_keep_codes_in_float32_and_move_them() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        vq = SoftVectorQuantizer(DIM, CODES, code_update=CodeUpdate(step_size=0.001)).to(dtype)
        z = torch.randn(64, DIM).to(dtype)
        vq(z)
        before = vq.codebook.clone()
        assert before.dtype == torch.float32
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        for number in range(3):
            z = torch.randn(64, DIM, generator=torch.Generator().manual_seed(number)).to(dtype).requires_grad_()
            output = vq(z)
            assert output.quantized.dtype == dtype
            output.quantized.sum().backward()
            optimizer.step()
        assert not torch.equal(vq.codebook, before)
        assert vq.decode(vq.encode(z)).shape == z.shape


def test_state_copies_and_pickles_go_on_alike() -> None:
    model, optimizer = started()
    for number in range(1, 5):
        step(model, optimizer, number)
    loaded = Model()
    loaded.load_state_dict(model.state_dict())
    twins = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert not any("marker" in name for name in model.state_dict())
    results = []
    for twin in (model, *twins):
        other = torch.optim.SGD(twin.parameters(), lr=1e-2)
        for number in range(5, 8):
            step(twin, other, number)
        results.append(twin.vq.codebook)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_a_run_resumed_before_the_start_is_over_goes_on_exactly() -> None:
    results = []
    for resumed in (False, True):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(12):
            if resumed and number == 3:
                assert not bool(model.vq.bank.initialized)
                state = model.state_dict()
                model = Model()
                model.load_state_dict(state)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            step(model, optimizer, number, size=5)
        assert bool(model.vq.bank.initialized)
        results.append(model.vq.codebook)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_states_of_codes_that_an_optimizer_moves_load_and_back() -> None:
    inside, outside = SoftVectorQuantizer(DIM, CODES), SoftVectorQuantizer(DIM, CODES, code_update="optimizer")
    z = torch.randn(64, DIM)
    inside(z)
    for source, target in ((inside, outside), (outside, inside)):
        target.load_state_dict(
            {name: value for name, value in source.state_dict().items() if name in target.state_dict()}, strict=False
        )
        assert torch.equal(target.eval().encode(z), nearest_prototype(z, source.codebook[0]))


def test_no_optimizer_can_hold_the_codes_too() -> None:
    model, _ = started()
    assert all(parameter.dim() == 0 for parameter in model.vq.parameters())
    with pytest.raises(ValueError, match="TokenNormalized optimizes"):
        TokenNormalized(model.vq.parameters(), lr=0.05).watch(model)
    with pytest.raises((TypeError, ValueError)):
        torch.optim.Adam([model.vq.bank.prototypes.unsqueeze(0).requires_grad_()[0]])


def test_weight_decay_leaves_codes_alone() -> None:
    model, _ = started()
    model.vq.requires_grad_(False)
    before = model.vq.codebook.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
    step(model, optimizer, 1)
    assert torch.equal(model.vq.codebook, before)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"commitment_ratio needs gradient='straight_through'.*got 0.5 and 'soft'"):
        SoftVectorQuantizer(DIM, CODES, commitment_ratio=0.5, gradient="soft")
    with pytest.raises(ValueError, match=r"step_size of a CodeUpdate must be in \(0, 1\], a step size; got 2"):
        CodeUpdate(step_size=2)
    with pytest.raises(ValueError, match=r"units of the distortion must be < 1.*got 1.5"):
        Temperature(1.5, "distortion")
    with pytest.raises(ValueError, match="code_update must be"):
        SoftVectorQuantizer(DIM, CODES, code_update="adam")  # type: ignore[arg-type]


def _frozen_by_eval_under_ddp(rank: int) -> float:
    torch.manual_seed(0)
    model = Model()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(6):
        model.vq.train(number < 3)
        loss = ddp(batch(number)[rank::2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_ddp_takes_codes_that_are_frozen_by_evaluation_mode(tmp_path: Path) -> None:
    assert all(value > 0 for value in results_of_processes(tmp_path, _frozen_by_eval_under_ddp))


def _trained_on_half(rank: int) -> Tensor:
    return _trained(processes=2, rank=rank)


def _trained(processes: int = 1, rank: int = 0) -> Tensor:
    """Codes after a few steps on this process's rows, with gradients averaged as DDP does, and calls of no step."""
    torch.manual_seed(0)
    encoder, vq = nn.Linear(6, DIM), SoftVectorQuantizer(DIM, CODES)
    optimizer = torch.optim.SGD([*encoder.parameters(), *vq.parameters()], lr=0.1)
    for number in range(6):
        if number % 2 == 0:
            vq(encoder(far()[rank::processes]))
        quantized = vq(encoder(batch(number)[rank::processes])).quantized
        optimizer.zero_grad()
        quantized.square().mean().backward()
        for parameter in encoder.parameters() if processes > 1 else ():
            assert parameter.grad is not None
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= processes
        optimizer.step()
    return torch.cat([vq.codebook.flatten(), encoder.weight.detach().flatten()])


def test_two_processes_move_codes_like_one(tmp_path: Path) -> None:
    first, second = results_of_processes(tmp_path, _trained_on_half)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, _trained(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_another_dtype_move_codes(tokens: torch.dtype) -> None:
    vq = SoftVectorQuantizer(DIM, CODES)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for number in range(3):
        z = torch.randn(64, DIM, generator=torch.Generator().manual_seed(number)).to(tokens).requires_grad_()
        before = vq.codebook.clone()
        quantized = vq(z).quantized
        assert quantized.dtype == tokens
        quantized.sum().backward()
        optimizer.step()
        assert not torch.equal(vq.codebook, before)


def test_a_mask_that_is_no_tensor_and_no_heads_are_refused() -> None:
    vq = SoftVectorQuantizer(DIM, CODES)
    with pytest.raises(TypeError, match=r"mask must be a tensor; got ndarray. Use torch.as_tensor"):
        vq(torch.randn(5, DIM), torch.ones(5, dtype=torch.bool).numpy())
    with pytest.raises(ValueError, match="num_heads must be at least 1; got 0"):
        SoftVectorQuantizer(DIM, CODES, num_heads=0)


def test_a_state_is_assigned_to_a_quantizer_without_storage() -> None:
    model, _ = started()
    z = torch.randn(20, DIM)
    with torch.device("meta"):
        empty = SoftVectorQuantizer(DIM, CODES)
    empty.load_state_dict(model.vq.state_dict(), assign=True)
    assert not any(value.is_meta for value in (*empty.parameters(), *empty.buffers()))
    assert torch.equal(empty.eval()(z).indices, model.vq.eval()(z).indices)
    empty.train()(z.requires_grad_()).quantized.sum().backward()
    empty.settle()
