"""Codebooks written and read again give the codes of the quantizer that they are of."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddcl_lightning import ResidualVectorQuantizer, encode_balanced
from ddcl_lightning.checkpoints.codebook_files import Codebooks, codebooks_of, load_codebooks, save_codebooks
from tests.tiny_ids import CODEBOOK, IDS, ITEMS, GivenCodes

safetensors = pytest.importorskip("safetensors")


def test_codes_of_a_file_are_those_of_the_quantizer(tmp_path: Path) -> None:
    quantizer = GivenCodes(torch.randn(3, 16, 5))
    save_codebooks(quantizer, tmp_path / "codes.safetensors")
    codebooks = load_codebooks(tmp_path / "codes.safetensors")
    assert torch.equal(codebooks.codebook, quantizer.codebook)
    vectors = 2 * torch.randn(400, 5)
    ids = quantizer.encode(vectors)
    assert torch.equal(codebooks.encode(vectors), ids)
    for levels in (1, 2, 3):
        torch.testing.assert_close(codebooks.decode(ids[:, :levels]), quantizer.decode(ids[:, :levels]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("whole", [False, True])
def test_ids_of_a_file_are_those_of_the_quantizer_in_every_dtype(dtype: torch.dtype, whole: bool) -> None:
    quantizer = ResidualVectorQuantizer(16, 64, 4)
    for _ in range(10):
        quantizer(torch.randn(512, 16))
        quantizer.settle()
    quantizer.eval()
    quantizer = quantizer.to(dtype) if whole else quantizer
    vectors = torch.randn(10_000, 16).to(dtype)
    ids, codebooks = quantizer.encode(vectors), codebooks_of(quantizer)
    assert torch.equal(codebooks.encode(vectors), ids)
    assert torch.equal(quantizer(vectors).indices, ids)
    if dtype != torch.float64:
        assert torch.equal(codebooks.encode(vectors.float()), ids)


def test_codes_that_have_not_started_are_refused(tmp_path: Path) -> None:
    quantizer, vectors = ResidualVectorQuantizer(5, 16, 3), torch.randn(400, 5)
    for act in (
        lambda: save_codebooks(quantizer, tmp_path / "codes.safetensors"),
        lambda: encode_balanced(quantizer, vectors),
    ):
        with pytest.raises(
            ValueError, match=r"codes have started; those of this ResidualVectorQuantizer are random: .* Train it"
        ):
            act()
    assert list(tmp_path.iterdir()) == []
    frozen = ResidualVectorQuantizer(5, 16, 3).requires_grad_(False)
    save_codebooks(frozen, tmp_path / "codes.safetensors")
    quantizer(vectors)
    save_codebooks(quantizer, tmp_path / "codes.safetensors")
    assert torch.equal(load_codebooks(tmp_path / "codes.safetensors").codebook, quantizer.codebook)


def test_codes_by_hand() -> None:
    codebooks = Codebooks(CODEBOOK)
    assert codebooks.encode(ITEMS).tolist() == IDS
    assert codebooks.decode(torch.tensor([[1, 2], [2, 0]])).tolist() == [[10.0, 1.0], [0.0, 10.0]]


def test_the_header_says_the_sizes_to_any_reader(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    save_codebooks(GivenCodes(torch.randn(3, 16, 5)), path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"num_levels": "3", "num_codes": "16", "dim": "5"}
    assert header["codebook"]["shape"] == [3, 16, 5]


def test_quantizers_that_project_are_refused(tmp_path: Path) -> None:
    class Projecting(GivenCodes):
        def decode(self, indices: Tensor) -> Tensor:
            return 2 * super().decode(indices)

    with pytest.raises(
        ValueError, match=r"encodes and decodes by its codes alone; Projecting does .* by save_pretrained"
    ):
        save_codebooks(Projecting(CODEBOOK), tmp_path / "codes.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(codebooks_of(GivenCodes(CODEBOOK)).codebook, CODEBOOK)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda books: books.encode(torch.full((3, 2), torch.nan)), ValueError, "vectors must be finite; got NaN"),
        (lambda books: books.encode(torch.full((3, 2), torch.inf)), ValueError, "vectors must be finite; got NaN"),
        (lambda books: books.encode(torch.ones(3, 5)), ValueError, r"shape \(N, d = 2\); got \(3, 5\). Pass"),
        (lambda books: books.encode(torch.ones(2)), ValueError, r"shape \(N, d = 2\); got \(2,\). Pass"),
        (lambda books: books.encode([[1.0, 2.0]]), TypeError, "vectors must be a tensor; got list"),
        (lambda books: books.decode(3), TypeError, "ids must be a tensor of integers; got an int. Pass"),
        (lambda books: books.decode(torch.tensor(1)), ValueError, r"ids must have shape \(N, L\).*; got \(\)"),
        (lambda books: books.decode(torch.tensor([1])), ValueError, r"ids must have shape \(N, L\).*; got \(1,\)"),
        (lambda books: books.decode(torch.zeros(2, 3).long()), ValueError, r"\(N, 1 to 2\).*; got \(2, 3\). Pass"),
        (lambda books: books.decode(torch.zeros(2, 0).long()), ValueError, r"\(N, 1 to 2\).*; got \(2, 0\). Pass"),
        (lambda books: books.decode(torch.tensor([[3, 0]])), ValueError, r"ids must be in \[0, num_codes = 3\)"),
        (lambda books: books.decode(torch.tensor([[-1, 0]])), ValueError, "ids must be at least 0; got -1"),
    ],
)
def test_vectors_and_ids_that_do_not_fit_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(Codebooks(CODEBOOK))


def test_modules_without_codes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"codebook, encode and decode; got a Linear\. Pass"):
        save_codebooks(torch.nn.Linear(2, 2), tmp_path / "codes.safetensors")  # type: ignore[arg-type]


def test_files_that_hold_no_codebook_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "codes.safetensors"
    with pytest.raises(FileNotFoundError, match="path must be a file that save_codebooks wrote; there is none at"):
        load_codebooks(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"path must be a file that save_codebooks wrote; .* is none"):
        load_codebooks(path)
    from safetensors.torch import save_file

    sizes = {"num_levels": "2", "num_codes": "3", "dim": "2"}
    for wrong in (CODEBOOK[:1], CODEBOOK * torch.nan):
        save_file({"codebook": wrong.contiguous()}, path, metadata=sizes)
        with pytest.raises(ValueError, match=r"must be finite numbers of shape .* = \(2, 3, 2\); got a tensor"):
            load_codebooks(path)
    with pytest.raises(ValueError, match=r"path must end in .safetensors; got 'codes.pt'"):
        save_codebooks(GivenCodes(CODEBOOK), "codes.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'ddcl-lightning\[hub\]'"):
        load_codebooks(path)


@pytest.mark.parametrize("scale", ["unit", "per_dimension", "total", "whiten"])
def test_quantizers_that_scale_are_refused(scale: Any, tmp_path: Path) -> None:
    quantizer = ResidualVectorQuantizer(8, 16, 3, embedding_scale=scale)
    for _ in range(5):
        quantizer(3 * torch.randn(500, 8) + 2)
        quantizer.settle()
    with pytest.raises(ValueError, match="encodes and decodes by its codes alone"):
        save_codebooks(quantizer.eval(), tmp_path / "codes.safetensors")
