"""Quantizers of the study rq_vae, all called alike: ``(quantized, indices (N, L), loss)`` of tokens ``(N, D)``."""

from typing import Any

import torch
from torch import Tensor, nn

from ddcl_lightning import ResidualVectorQuantizer
from ddcl_lightning.nn.initialization import initial_prototypes


class StraightThroughLevels(nn.Module):
    """The recipe of public RQ-VAE trainers: codes that Adam moves by the codebook loss, and a commitment.

    Both losses are squared distances summed over dimensions; the residual of a level passes no gradient to the one
    before; k-means, level by level, gives the start.
    """

    def __init__(self, dim: int, codes: int, levels: int, commitment: float) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList([nn.Parameter(torch.rand(codes, dim)) for _ in range(levels)])
        self.commitment = commitment

    @torch.no_grad()
    def start(self, tokens: Tensor, seed: int) -> None:
        """K-means of the tokens, then of what each level leaves."""
        for codebook in self.codebooks:
            codebook.copy_(initial_prototypes(tokens, len(codebook), num_restarts=1, seed=seed))
            tokens = tokens - codebook[torch.cdist(tokens, codebook).argmin(1)]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize."""
        residual, total, loss, indices = z, torch.zeros_like(z), z.new_zeros(()), []
        for codebook in self.codebooks:
            index = torch.cdist(residual.detach(), codebook.detach()).argmin(1)
            code = codebook[index]
            moved = (residual.detach() - code).square().sum(-1).mean()
            loss = loss + moved + self.commitment * (residual - code.detach()).square().sum(-1).mean()
            indices.append(index)
            total = total + code.detach()
            residual = (residual - code).detach()
        return z + (total - z).detach(), torch.stack(indices, -1), loss


class LibraryLevels(nn.Module):
    """``ResidualVQ`` of vector-quantize-pytorch: EMA, k-means start, expiry of dead codes."""

    def __init__(self, dim: int, codes: int, levels: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        from vector_quantize_pytorch import ResidualVQ

        self.layer = ResidualVQ(dim=dim, codebook_size=codes, num_quantizers=levels, kmeans_init=True, **arguments)

    @torch.no_grad()
    def start(self, tokens: Tensor, seed: int) -> None:
        """Its own k-means start, on as many tokens as the recipe has."""
        self.train()
        self.layer(tokens.unsqueeze(0))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize."""
        quantized, indices, losses = self.layer(z.unsqueeze(0))
        return quantized[0], indices[0], losses.sum()


class SoftLevels(nn.Module):
    """Ours: one line and nothing else; it starts by itself on its first batches."""

    def __init__(self, dim: int, codes: int, levels: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.layer = ResidualVectorQuantizer(dim, codes, levels, **arguments)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize."""
        quantized, indices, terms = self.layer(z)
        return quantized, indices, terms.loss


def create(config: dict[str, Any]) -> nn.Module:
    """The quantizer of a configuration."""
    size = (config["dim"], config["codes"], config["levels"])
    if config["quantizer"] == "straight_through":
        return StraightThroughLevels(*size, config["commitment"])
    if config["quantizer"] == "ResidualVQ":
        return LibraryLevels(*size, config["arguments"])
    if config["quantizer"] == "ours":
        return SoftLevels(*size, config["arguments"])
    raise ValueError(f"quantizer must be known; got {config['quantizer']!r}.")
