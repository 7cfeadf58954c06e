"""A plain convolutional autoencoder with a quantizer in the middle, its images, and what is measured of it.

Nothing here is of Lightning: ``torch.optim.Adam(model.parameters())`` and a loop, as people write it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _study import Options
from _tables import Config
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddcl_lightning import CodeUpdate, EmbeddingScale, SoftVectorQuantizer
from ddcl_lightning.datamodules import CIFAR10DataModule, FashionMNISTDataModule
from ddcl_lightning.functional import effective_dimension
from ddcl_lightning.metrics.clustering_metrics import perplexity, usage

EVAL_BATCH = 250


class Images(NamedTuple):
    """Images ``(N, C, H, W)`` in [0, 1] of three splits."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_images(name: str, train: int, held_out: int, options: Options) -> Images:
    """A fixed choice of images: those of validation come from the training split, those of the test from its own."""
    generator = torch.Generator().manual_seed(0)
    if name == "digits":  # without a test split of its own
        pixels = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)
        order = torch.randperm(len(pixels), generator=generator)
        return Images(*(pixels[rows] for rows in (order[720:][:train], order[360:720], order[:360])))
    data = (
        FashionMNISTDataModule(path=str(options.fashion))
        if name == "fashion"
        else CIFAR10DataModule(path=str(options.cifar))
    )
    loaded = data.load()
    number = len(loaded.y) - loaded.num_test
    chosen = torch.randperm(number, generator=generator)[: train + held_out]
    test = number + torch.randperm(loaded.num_test, generator=generator)[: 2 * held_out]
    return Images(*(loaded.fetch(rows)["x"].float() for rows in (chosen[:train], chosen[train:], test)))


class Autoencoder(nn.Module):
    """Strided convolutions, a quantizer of feature maps, and their mirror.

    Args:
        channels: C of the images.
        dim: Dimension of the tokens.
        widths: Channels of the stages, each of which halves the height and the width.
        quantize: ``quantize(z)`` of feature maps ``(B, D, H, W)``: ``(quantized, indices, loss)``.
        bias: Whether the encoder's layers have a bias.
        norm: Whether the encoder ends in a layer normalization of every token, without parameters.
        size: Factor of the encoder's output at the start: that of the weights of its last layer.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        widths: tuple[int, ...],
        quantize: nn.Module,
        bias: bool = True,
        norm: bool = False,
        size: float = 1.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1, bias=bias), nn.ReLU()]
        last = nn.Conv2d(widths[-1], dim, 1, bias=bias)
        self.encoder = nn.Sequential(
            *layers, nn.Conv2d(widths[-1], widths[-1], 3, padding=1, bias=bias), nn.ReLU(), last
        )
        self.norm = nn.GroupNorm(1, dim, affine=False) if norm else None
        self.size = size
        self.quantize = quantize
        layers = [nn.Conv2d(dim, widths[-1], 3, padding=1), nn.ReLU()]
        for before, after in zip(widths[::-1], (*widths[-2::-1], channels), strict=True):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(size)

    def encode(self, x: Tensor) -> Tensor:
        """Tokens as a feature map ``(B, dim, H, W)``."""
        z: Tensor = self.encoder(x)
        if self.norm is not None:  # of each token
            tokens = z.movedim(1, -1)
            z = F.layer_norm(tokens, tokens.shape[-1:]).movedim(-1, 1) * self.size
        return z

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, indices, and the quantizer's loss."""
        quantized, indices, loss = self.quantize(self.encode(x))
        return self.decoder(quantized), indices, loss


class NoQuantizer(nn.Module):
    """Tokens as they are."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing."""
        return z, torch.zeros_like(z[:, 0], dtype=torch.int64), z.new_zeros(())


class LibraryQuantizer(nn.Module):
    """``VectorQuantize`` of vector-quantize-pytorch on feature maps, if wished behind tokens of unit variance."""

    def __init__(self, dim: int, codes: int, arguments: Config, scale: bool) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.scale = EmbeddingScale(dim, "total" if scale else "none")
        self.layer = VectorQuantize(dim=dim, codebook_size=codes, **arguments)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize."""
        quantized, indices, loss = self.layer(self.scale(z.flatten(2).mT))
        return quantized.mT.unflatten(-1, z.shape[2:]), indices.unflatten(-1, z.shape[2:]), loss.sum()


class SoftQuantizer(nn.Module):
    """Ours: one line and nothing else."""

    def __init__(self, dim: int, codes: int, arguments: Config) -> None:
        super().__init__()
        arguments = dict(arguments)
        if "code_update" in arguments:
            arguments["code_update"] = CodeUpdate(**arguments["code_update"])
        self.layer = SoftVectorQuantizer(dim, codes, channels="first", **arguments)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize."""
        quantized, indices, terms = self.layer(z)
        return quantized, indices, terms.loss


def train_epoch(model: Autoencoder, images: Tensor, batch: int, optimizer: torch.optim.Optimizer) -> None:
    """One pass; a last batch that is not full is left out."""
    model.train()
    for rows in torch.randperm(len(images)).split(batch):
        if len(rows) == batch:
            reconstruction, _, loss = model(images[rows])
            optimizer.zero_grad()
            (F.mse_loss(reconstruction, images[rows]) + loss).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(model: Autoencoder, images: Tensor, codes: int) -> dict[str, float]:
    """Error of HARD codes, the codes in use, and the effective dimension of what the encoder gives."""
    model.eval()
    error, tokens, counts = 0.0, [], torch.zeros(codes, dtype=torch.int64)
    for batch in images.split(EVAL_BATCH):
        z = model.encode(batch)
        quantized, indices, _ = model.quantize(z)
        error += float((model.decoder(quantized) - batch).square().mean()) * len(batch) / len(images)
        tokens.append(z.flatten(2).mT.flatten(0, 1))
        counts += torch.bincount(indices.flatten(), minlength=codes)
    return {
        "mse": round(error, 7),
        "usage": round(float(usage(counts)), 4),
        "perplexity": round(float(perplexity(counts)), 2),
        "effective_dimension": round(float(effective_dimension(torch.cat(tokens).double())), 3),
    }


def quantizer(config: dict[str, Any]) -> nn.Module:
    """The quantizer of a configuration: one line each."""
    dim, codes = config["dim"], config["codes"]
    if config["quantizer"] == "none":
        return NoQuantizer()
    if config["quantizer"] == "VectorQuantize":
        return LibraryQuantizer(dim, codes, config["arguments"], config["scale"])
    if config["quantizer"] in ("ours", "candidate"):
        return SoftQuantizer(dim, codes, config["arguments"])
    raise ValueError(f"quantizer must be known; got {config['quantizer']!r}.")
