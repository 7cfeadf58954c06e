"""Networks of other people's kinds for collapse_warning: residual quantizers, an nn.Embedding as codebook, SwAV."""

from typing import Any

import torch
from _collapse_data import Data
from _collapse_models import DIM, EMA, RATE, TEST_IMAGES, WIDTHS, Training, clustering_quality, reconstruction_quality
from _tables import Config
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss, normalize
from vector_quantize_pytorch import ResidualVQ

from ddcl_lightning import ConvBackbone, ConvDecoder

RESIDUAL: dict[str, Any] = {**EMA, "kmeans_init": True, "threshold_ema_dead_code": 2}
NOISE = 0.15  # of SwAV's two views, beside a move by one pixel
TEMPERATURE = 0.1  # of SwAV's scores


class EmbeddingQuantizer(nn.Module):
    """Straight-through codes in an ``nn.Embedding``, as a VQGAN has them, under a name that nobody recognises."""

    def __init__(self, codes: int, commitment: float) -> None:
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Embedding(codes, DIM)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes' vectors ``(B, T, d)`` for tokens of that shape, their indices ``(B, T)``, and the loss."""
        weight = self.embedding.weight
        indices = torch.cdist(tokens.detach().flatten(0, 1), weight.detach()).argmin(-1).view(tokens.shape[:2])
        vectors = self.embedding(indices)
        loss = mse_loss(vectors, tokens.detach()) + self.commitment * mse_loss(tokens, vectors.detach())
        return tokens + (vectors - tokens).detach(), indices, loss


class Autoencoder(nn.Module):
    """A convolutional autoencoder around any quantizer that returns vectors, indices and a loss."""

    def __init__(self, channels: int, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = ConvBackbone(channels, DIM, WIDTHS), ConvDecoder(channels, WIDTHS)
        self.decoder.build(DIM)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images that come back, and the loss of the quantizer."""
        vectors, _, loss = self.quantizer(self.encoder({"x": x}).values)
        return self.decoder(vectors), loss.sum()


def plain_autoencoder(config: Config, data: Data) -> Training:
    """Images through a residual quantizer or an ``nn.Embedding``."""
    codes, variance = config["codes"], float(data.x.var())
    if config["method"] == "residual":
        levels = {"num_quantizers": 3, "codebook_size": codes}
        quantizer: nn.Module = ResidualVQ(dim=DIM, **levels, **RESIDUAL | config.get("arguments", {}))
    else:
        quantizer = EmbeddingQuantizer(codes, config.get("commitment", 0.25))
    model = Autoencoder(data.x.shape[1], quantizer)

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        decoded, loss = model(x)
        error = mse_loss(decoded, x)
        return error + variance * loss, error.detach()

    def evaluate(x: Tensor, y: Tensor) -> dict[str, float]:
        return reconstruction_quality(model(x[:TEST_IMAGES])[0], x[:TEST_IMAGES])

    rate = config.get("rate", RATE)
    slow = [p for name, p in model.named_parameters() if not name.startswith("quantizer")]
    optimizer = torch.optim.Adam([{"params": slow, "lr": rate}])
    fast = list(quantizer.parameters())
    if fast:
        optimizer.add_param_group({"params": fast, "lr": config.get("rate_of_codes", RATE)})
    training = Training(model, losses, lambda x: quantizer(model.encoder({"x": x}).values), evaluate, [optimizer])
    if config["method"] == "embedding":
        training.named = ("quantizer.embedding",)
    return training


@torch.no_grad()
def start_embedding(training: Training, x: Tensor, seed: int) -> None:
    """Codes of an ``nn.Embedding`` from tokens drawn at random."""
    model = training.model
    assert isinstance(model, Autoencoder)
    weight: Any = model.quantizer.embedding.weight  # type: ignore[union-attr]
    tokens = model.encoder({"x": x}).values.flatten(0, 1)
    weight.copy_(tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[: len(weight)]])


class DigitPrototypes(nn.Module):
    """SwAV's prototypes: a linear layer without a bias."""

    def __init__(self, dim: int, codes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, codes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``(B, K)``."""
        return self.layer(features)


class SwAV(nn.Module):
    """An encoder of digits with prototypes on its normalised features."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, DIM))
        self.encoder, self.prototypes = nn.Sequential(*layers), DigitPrototypes(DIM, codes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(B, K)``."""
        return self.prototypes(normalize(self.encoder(x), dim=-1))


@torch.no_grad()
def balanced(scores: Tensor, epsilon: float, rounds: int = 3) -> Tensor:
    """Targets ``(B, K)`` in which the prototypes share the batch evenly, by Sinkhorn's algorithm."""
    q = torch.softmax(scores.flatten() / epsilon, 0).view_as(scores)
    for _ in range(rounds):
        q = q / q.sum(0).clamp(min=1e-30) / q.shape[1]
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30) / q.shape[0]
    return q * len(q)


def view(x: Tensor) -> Tensor:
    """Digits moved by up to one pixel, with noise."""
    moves = tuple(int(move) for move in torch.randint(-1, 2, (2,)))
    return torch.roll(x.view(-1, 8, 8), moves, (1, 2)).flatten(1) + NOISE * torch.randn_like(x)


def swav(config: Config, data: Data) -> Training:
    """Digits by swapped predictions between two views."""
    codes, epsilon, rate = config["codes"], config.get("epsilon", 0.05), config.get("rate", 3e-3)
    model = SwAV(codes)

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(torch.cat([view(x), view(x)]))
        pair = scores.chunk(2)
        if config["targets"] == "sinkhorn":
            targets = [balanced(each.detach(), epsilon) for each in pair]
        else:
            targets = [torch.softmax(each.detach() / epsilon, -1) for each in pair]
        loss = -sum(
            (target * log_softmax(each / TEMPERATURE, -1)).sum(-1).mean()
            for target, each in zip(targets, reversed(pair), strict=True)
        )
        assert isinstance(loss, Tensor)
        return loss / 2, loss.detach() / 2

    @torch.no_grad()
    def normalized_prototypes() -> None:
        weight = model.prototypes.layer.weight
        weight.copy_(normalize(weight, dim=-1))

    def evaluate(x: Tensor, y: Tensor) -> dict[str, float]:
        return clustering_quality(model(x).argmax(-1), y, codes)

    normalized_prototypes()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return Training(model, losses, model, evaluate, [optimizer], after_step=normalized_prototypes)
