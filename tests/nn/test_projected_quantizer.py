"""Quantizers in exported and compiled graphs, with any number of samples and tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from ddcl_lightning import ResidualVectorQuantizer, SoftVectorQuantizer
from ddcl_lightning.nn.projected_quantizer import ProjectedQuantizer

D, K = 8, 16
KINDS: dict[str, Callable[[], ProjectedQuantizer]] = {
    "plain": lambda: SoftVectorQuantizer(D, K),
    "projected": lambda: SoftVectorQuantizer(D, K, code_dim=4, num_heads=2, embedding_scale="per_dimension"),
    "residual": lambda: ResidualVectorQuantizer(D, K, 2, shared_codebook=True, code_dim=4),
}
SHAPES = {
    "vectors": (40, D),
    "tokens": (4, 40, D),
    "maps": (2, D, 5, 6),
}


class Method(nn.Module):
    """One method of a quantizer as a module."""

    def __init__(self, quantizer: ProjectedQuantizer, name: str) -> None:
        super().__init__()
        self.quantizer, self.name = quantizer, name

    def forward(self, *inputs: Tensor) -> object:
        return getattr(self.quantizer, self.name)(*inputs)


def tokens(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(kind: str) -> ProjectedQuantizer:
    torch.manual_seed(0)
    quantizer = KINDS[kind]()
    quantizer(tokens((4, 100, D)))
    return quantizer.eval()


def dynamic(shape: tuple[int, ...]) -> dict[int, Dim]:
    """All dimensions but that of the channels, and of the levels or heads behind indices."""
    return {place: Dim(f"d{place}", min=2, max=4096) for place, size in enumerate(shape) if size not in (D, 2, 3)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_are_exported_for_any_number_of_tokens(kind: str, shape: str) -> None:
    quantizer = started(kind)
    size = SHAPES[shape]
    z, other = (
        tokens((5, *size[1:]) if shape == "maps" else size),
        tokens((7, D, 4, 9) if shape == "maps" else (7, 11, D)),
    )
    if shape == "vectors":
        other = tokens((33, D))
    for name in ("forward", "encode"):
        places = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")} if shape == "maps" else dynamic(z.shape),)
        program = export(Method(quantizer, name), (z,), dynamic_shapes=(places,)).module()
        actual, expected = program(other), getattr(quantizer, name)(other)
        if name == "forward":
            torch.testing.assert_close(actual[0], expected.quantized)
            assert torch.equal(actual[1], expected.indices)
        else:
            assert torch.equal(actual, expected)
    indices, others = quantizer.encode(z), quantizer.encode(other)
    places = ({place: Dim(f"d{place}") for place in range(z.dim() - 1)},)
    program = export(Method(quantizer, "decode"), (indices,), dynamic_shapes=(places,)).module()
    torch.testing.assert_close(program(others), quantizer.decode(others))


def test_masks_are_exported_with_the_tokens() -> None:
    quantizer = started("plain")
    both = {0: Dim("b"), 1: Dim("t")}
    mask = tokens((4, 40)) > 0
    program = export(Method(quantizer, "encode"), (tokens((4, 40, D)), mask), dynamic_shapes=((both, both),)).module()
    other, other_mask = tokens((7, 11, D), 1), tokens((7, 11), 2) > 0
    assert torch.equal(program(other, other_mask), quantizer.encode(other, other_mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_quantizers_run_as_onnx(kind: str, tmp_path: Path) -> None:
    """With other numbers of samples and tokens; onnx, onnxscript and onnxruntime are in no extra of this project."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    quantizer = started(kind)
    z, other = tokens((4, 40, D)), tokens((7, 11, D))
    for name, given, asked in (
        ("encode", z, other),
        ("decode", quantizer.encode(z), quantizer.encode(other)),
    ):
        program = export(Method(quantizer, name), (given,), dynamic_shapes=(({0: Dim("b"), 1: Dim("t")},),))
        torch.onnx.export(program, f=tmp_path / "q.onnx", dynamo=True)
        session = runtime.InferenceSession(tmp_path / "q.onnx")
        (actual,) = session.run(None, {session.get_inputs()[0].name: asked.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), getattr(quantizer, name)(asked))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_compiles_in_one_graph(kind: str) -> None:
    quantizer = started(kind)
    z = tokens((4, 40, D))
    for name, given in (("forward", z), ("encode", z), ("decode", quantizer.encode(z))):
        torch._dynamo.reset()
        compiled = torch.compile(Method(quantizer, name), fullgraph=True, backend="eager", dynamic=True)
        actual, expected = compiled(given), getattr(quantizer, name)(given)
        torch.testing.assert_close(
            actual[0] if name == "forward" else actual, expected[0] if name == "forward" else expected
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_training_compiles_with_breaks_and_moves_codes_alike() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        quantizer, linear = SoftVectorQuantizer(D, K), nn.Linear(D, D)
        optimizer = torch.optim.SGD([*linear.parameters(), *quantizer.parameters()], lr=0.1)
        run = torch.compile(quantizer, backend="eager") if compiled else quantizer
        for number in range(4):
            quantized, _, terms = run(linear(tokens((4, 40, D), number)))
            optimizer.zero_grad()
            (quantized.square().mean() + terms.loss).backward()
            optimizer.step()
        results.append(quantizer.codebook.clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_calls_without_gradients_never_start_codes_anew(residual: bool) -> None:
    """After each number of steps at which the codes are looked at, on tokens of another place."""
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(8, 16, 3) if residual else SoftVectorQuantizer(8, 16)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(17):
        output = quantizer(torch.randn(64, 8, requires_grad=True))
        (output.quantized.square().mean() + output.terms.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = quantizer.codebook.clone()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                quantizer(torch.randn(64, 8) + 3)
        assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("residual", [False, True])
def test_codes_that_project_take_tokens_of_any_float_dtype(residual: bool) -> None:
    quantizer = ResidualVectorQuantizer(8, 16, 3, code_dim=4) if residual else SoftVectorQuantizer(8, 16, code_dim=4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        assert quantizer(torch.randn(4, 8, dtype=dtype)).quantized.dtype == dtype


def test_calls_of_several_dtypes_count_between_two_steps() -> None:
    quantizer = SoftVectorQuantizer(8, 16)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        quantizer(torch.randn(100, 8, dtype=dtype))
    before = quantizer.codebook.clone()
    quantizer.settle()
    assert not torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("residual", [False, True])
def test_values_that_are_no_numbers_are_not_encoded(residual: bool) -> None:
    quantizer = ResidualVectorQuantizer(8, 16, 3) if residual else SoftVectorQuantizer(8, 16)
    with pytest.raises(ValueError, match="tokens must be finite; got NaN or infinity"):
        quantizer.encode(torch.full((3, 8), torch.nan))
    dirty = torch.randn(3, 8)
    dirty[1] = torch.nan
    codes = quantizer.encode(dirty, torch.tensor([True, False, True]))
    assert bool((codes[1] == -1).all())


@pytest.mark.parametrize("residual", [False, True])
def test_integers_of_any_type_decode(residual: bool) -> None:
    quantizer = ResidualVectorQuantizer(8, 16, 3) if residual else SoftVectorQuantizer(8, 16)
    codes = quantizer.encode(torch.randn(5, 8))
    for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        assert torch.equal(quantizer.decode(codes.to(dtype)), quantizer.decode(codes))
    with pytest.raises(TypeError, match=r"indices must be a tensor of integers; got a list of 1"):
        quantizer.decode([0])
    with pytest.raises(ValueError, match=r"indices must be integers of shape .*got torch.bool"):
        quantizer.decode(codes > 0)


def test_a_sample_too_small_to_judge_codes_by_revives_none() -> None:
    quantizer = SoftVectorQuantizer(8, 16)
    with pytest.raises(ValueError, match=r"tokens must be at least 4 per code, 64, .* got 63"):
        quantizer.revive(torch.randn(63, 8))
    with pytest.raises(ValueError, match="tokens must be finite"):
        quantizer.revive(torch.full((100, 8), torch.nan))
    for threshold in (2, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\), .*; got {threshold}. 0.5 suits"):
            quantizer.revive(torch.randn(100, 8), threshold=threshold)


def test_shared_codes_that_later_levels_use_are_not_revived() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(40, 8)[torch.randint(40, (4000,))] * 4 + 0.2 * torch.randn(4000, 8)
    quantizer = ResidualVectorQuantizer(8, 32, 3, shared_codebook=True)
    for _ in range(30):
        quantizer(tokens)
        quantizer.settle()
    quantizer.eval()
    error = (quantizer(tokens).quantized - tokens).square().sum()
    quantizer.revive(tokens)
    assert (quantizer(tokens).quantized - tokens).square().sum() < 1.02 * error
