"""Codebooks of a residual quantizer as a file that needs nothing of ours: tensors and their sizes, in safetensors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import described
from ddcl_lightning._utils.files import whole_file
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.functional._common import check_code_range, require_finite_tokens, require_floating
from ddcl_lightning.functional.id_collisions import check_ids
from ddcl_lightning.nn.balanced_ids import LevelQuantizer
from ddcl_lightning.nn.quantizer_base import require_started

if TYPE_CHECKING:
    from types import ModuleType

TENSOR, SUFFIX = "codebook", ".safetensors"
SIZES = ("num_levels", "num_codes", "dim")
STRETCH, AGREEMENT = 1.5, 0.99  # of the codes' sums in a trial of encode, and the share of indices that must agree


class Codebooks(NamedTuple):
    """Codes of L levels as plain tensors, which encode and decode as the quantizer that they are of.

    Attributes:
        codebook: ``(L, K, d)`` float32.
    """

    codebook: Tensor

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """IDs of vectors: at each level the code that is nearest to what the levels before have left.

        Args:
            vectors: ``(N, d)``, as the quantizer reads them: what an encoder makes of an item. Half precisions are
                computed in float32.

        Returns:
            ``(N, L)`` int64, as the quantizer gives them: both leave residuals in float32 or wider. Only ties within
            rounding may differ, as on another device.

        Raises:
            TypeError: If vectors are no floating-point tensor.
            ValueError: If they have another shape, or one is not finite.
        """
        require_floating(vectors, "vectors")
        if vectors.dim() != 2 or vectors.shape[1] != self.codebook.shape[2]:
            raise ValueError(
                f"vectors must have shape (N, d = {self.codebook.shape[2]}); got {tuple(vectors.shape)}. Pass what the "
                "encoder of these codebooks returns, a row per item."
            )
        require_finite_tokens(vectors, "vectors")
        rest, ids = vectors.to(torch.promote_types(vectors.dtype, self.codebook.dtype)), []
        for codes in self.codebook:
            ids.append(nearest_prototype(rest, codes))
            rest = rest - codes[ids[-1]].to(rest.dtype)
        return torch.stack(ids, 1)

    def decode(self, ids: Tensor) -> Tensor:
        """Sums of codes.

        Args:
            ids: ``(N, l)`` integers in [0, K), 1 <= l <= L: the codes of the first l levels.

        Returns:
            ``(N, d)``.

        Raises:
            TypeError: If IDs are no tensor of integers.
            ValueError: If they have another shape or, on a CPU, where looking is free, one is out of range.
        """
        check_ids(ids, lowest=0)
        levels, size = self.codebook.shape[:2]
        if not 1 <= ids.shape[1] <= levels:
            raise ValueError(
                f"ids must have shape (N, 1 to {levels}), a code per level; got {tuple(ids.shape)}. Pass what encode "
                "of these codebooks returns, or its first columns."
            )
        check_code_range("ids", ids, f"num_codes = {size}", size)
        return torch.stack([codes[level] for codes, level in zip(self.codebook, ids.unbind(1), strict=False)]).sum(0)


def codebooks_of(quantizer: LevelQuantizer) -> Codebooks:
    """A copy of the codes of a residual quantizer.

    Raises:
        TypeError: If it is no quantizer.
        ValueError: If its codes have not started, or it does something else than its codes alone, as one of tokens
            that are projected or scaled.
    """
    if not all(hasattr(quantizer, name) for name in ("codebook", "encode", "decode")):
        raise TypeError(
            f"quantizer must have codebook, encode and decode; got {described(quantizer)}. Pass a "
            "ResidualVectorQuantizer, or the quantizer inside of a head."
        )
    require_started(quantizer, "quantizer")
    codebook = quantizer.codebook.detach().float().cpu().clone()
    device = quantizer.codebook.device
    levels, size = codebook.shape[:2]
    # Every code of every level once, beside others of the other levels.
    ids = (torch.arange(size).unsqueeze(1) + torch.arange(levels)) % size
    with torch.no_grad():
        decoded = quantizer.decode(ids.to(device)).float().cpu()
    plain = Codebooks(codebook)
    expected = plain.decode(ids)
    same = decoded.shape == expected.shape and torch.allclose(decoded, expected, rtol=1e-4, atol=1e-5)
    if same:  # vectors that any scaling would move into other cells; rounding may decide a few of them
        vectors = STRETCH * expected + expected.std() * torch.randn(expected.shape, generator=_fixed_generator())
        with torch.no_grad():
            own = quantizer.encode(vectors.to(device, quantizer.codebook.dtype)).cpu()
        same = float((own == plain.encode(vectors)).float().mean()) > AGREEMENT
    if not same:
        raise ValueError(
            f"codebooks must be of a quantizer that encodes and decodes by its codes alone; {type(quantizer).__name__} "
            "does something else, such as a projection or embedding_scale. Save the whole head by save_pretrained."
        )
    return plain


def _fixed_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def save_codebooks(quantizer: LevelQuantizer, path: str | Path) -> None:
    """Write the codes of a residual quantizer: a tensor ``codebook`` ``(L, K, d)`` and, in the header, its sizes.

    Any reader of safetensors reads the file; the header's metadata are ``num_levels``, ``num_codes`` and ``dim``.

    Args:
        quantizer: Any with ``codebook`` and ``decode``, such as ``ResidualVectorQuantizer``.
        path: File to write, ``.safetensors``.

    Raises:
        ImportError: Without safetensors (``pip install 'ddcl-lightning[hub]'``).
        TypeError: If it is no quantizer.
        ValueError: If the name ends in something else, the quantizer does something else than its codes alone, or its
            codes have not started.
        OSError: If the file cannot be written.
    """
    check_codebook_path(path)
    codebook = codebooks_of(quantizer).codebook
    sizes = dict(zip(SIZES, map(str, codebook.shape), strict=True))
    with whole_file(path) as draft:
        draft.write_bytes(_safetensors().save({TENSOR: codebook.contiguous()}, metadata=sizes))


def load_codebooks(path: str | Path) -> Codebooks:
    """Read what :func:`save_codebooks` wrote.

    Raises:
        ImportError: Without safetensors.
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no finite codebook of the sizes in its header.
    """
    safetensors = _safetensors()
    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a file that save_codebooks wrote; there is none at {str(path)!r}.")
    try:
        codebook: Tensor = safetensors.load_file(str(path))[TENSOR]
        sizes = tuple(int(_metadata(path)[name]) for name in SIZES)
    except Exception as error:  # safetensors' own error is a bare Exception
        raise ValueError(
            f"path must be a file that save_codebooks wrote; {str(path)!r} is none ({type(error).__name__}: {error})."
        ) from None
    if codebook.shape != sizes or not codebook.is_floating_point() or not bool(codebook.isfinite().all()):
        raise ValueError(
            f"codebook of {str(path)!r} must be finite numbers of shape (num_levels, num_codes, dim) = {sizes}; got "
            f"{described(codebook)}. Write it again."
        )
    return Codebooks(codebook)


def check_codebook_path(path: str | Path, argument: str = "path") -> None:
    """Raise unless codebooks could be written there.

    Raises:
        ImportError: Without safetensors.
        ValueError: If the name ends in something else.
    """
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"{argument} must end in {SUFFIX}; got {str(path)!r}. Name it {Path(path).stem + SUFFIX!r}.")
    _safetensors()


def _metadata(path: str | Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def _safetensors() -> "ModuleType":
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of codebooks need safetensors: pip install 'ddcl-lightning[hub]'.") from error
    return safetensors.torch
