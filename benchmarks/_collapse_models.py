"""What the runs of collapse_warning train, built from plain configurations: our module with any head, on any task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from _collapse_data import Data
from _tables import Config
from torch import Tensor, nn
from torch.optim import Optimizer

from ddcl_lightning import (
    Backbone,
    Classification,
    Clustering,
    ConvBackbone,
    ConvDecoder,
    DDCLReadout,
    DDCLReadoutModule,
    Head,
    OptimizerConfig,
    PCABackbone,
    Reconstruction,
    Temperature,
    Tokens,
)
from ddcl_lightning._utils.batch import Batch, inputs
from ddcl_lightning.heads import HierarchicalReadout, SoftVQ, VQPooling
from ddcl_lightning.integrations.vector_quantize import LibraryVQ
from ddcl_lightning.metrics.clustering_metrics import count_matrix, hungarian_accuracy, normalized_mutual_info

DIM, WIDTHS = 16, (16,)
FAR = 30.0  # distance of codes that start far away, in deviations of the tokens
TEST_IMAGES = 160  # that are reconstructed
RATE = 2e-3  # of encoder and decoder of an autoencoder
EMA: dict[str, Any] = {"decay": 0.99, "commitment_weight": 0.25, "rotation_trick": False}
LIBRARY: dict[str, tuple[str, dict[str, Any]]] = {
    "ema": ("VectorQuantize", {**EMA, "kmeans_init": True, "threshold_ema_dead_code": 2}),
    "ema-raw": ("VectorQuantize", {**EMA, "kmeans_init": False, "threshold_ema_dead_code": 0}),
    "rotation": (
        "VectorQuantize",
        {"decay": 0.99, "kmeans_init": True, "threshold_ema_dead_code": 2, "rotation_trick": True},
    ),
    "cosine": ("VectorQuantize", {**EMA, "kmeans_init": True, "use_cosine_sim": True}),
    "simvq": ("SimVQ", {}),
    "fsq": ("FSQ", {}),
}


@dataclass
class Training:
    """A model, how it is trained for one step, and how it is looked at.

    Attributes:
        model: Where the codebooks are.
        losses: Of a training batch ``(x, y)``: what trains, and the task's own loss, None without a task.
        observe: Forward pass of samples through encoder and codebooks.
        evaluate: Quality of held-out samples ``(x, y)`` by name, the first is that which counts.
        optimizers: What steps.
        schedules: First and last temperature by the name of a bank.
        meaningful_start: Whether the tokens mean something before the first step.
        named: Names of codebooks that are not recognised.
        after_step: Called after every step.
    """

    model: nn.Module
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    observe: Callable[[Tensor], Any]
    evaluate: Callable[[Tensor, Tensor], Mapping[str, float]]
    optimizers: list[Optimizer]
    schedules: dict[str, tuple[float, float]] = field(default_factory=dict)
    meaningful_start: bool = False
    named: tuple[str, ...] = ()
    after_step: Callable[[], None] = lambda: None


class MLPBackbone(Backbone):
    """Rows to one token each, from random weights."""

    def __init__(self, in_features: int, embed_dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        sizes = (in_features, hidden, hidden)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, embed_dim))

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, 1, embed_dim)``."""
        return Tokens(self.net(inputs(batch)).unsqueeze(1))


class PatchPCABackbone(Backbone):
    """The nine overlapping 4 x 4 patches of a digit, by a linear map that starts as their PCA."""

    def __init__(self, x: Tensor, embed_dim: int = 8) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.map = nn.Linear(16, embed_dim)
        patches = self._patches(x).flatten(0, 1)
        center = patches.mean(0)
        axes = torch.linalg.svd(patches - center, full_matrices=False)[2][:embed_dim]
        with torch.no_grad():
            self.map.weight.copy_(axes)
            self.map.bias.copy_(-axes @ center)

    @staticmethod
    def _patches(x: Tensor) -> Tensor:
        return nn.functional.unfold(x.view(-1, 1, 8, 8), 4, stride=2).transpose(1, 2)

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, 9, embed_dim)``."""
        return Tokens(self.map(self._patches(inputs(batch))))


def clustering_quality(clusters: Tensor, y: Tensor, size: int) -> dict[str, float]:
    """Mutual information with the classes, normalised, and accuracy."""
    counts = count_matrix(clusters, y, size, 10)
    return {"nmi": float(normalized_mutual_info(counts)), "acc": float(hungarian_accuracy(counts))}


def reconstruction_quality(decoded: Tensor, x: Tensor) -> dict[str, float]:
    """Share of the variance of held-out images around their mean that comes back."""
    return {"explained": 1 - float((decoded.float() - x).square().mean() / (x - x.mean(0)).square().mean())}


def readout_training(module: DDCLReadoutModule, config: Config, evaluate: Any, own_loss: str | None) -> Training:
    """The training of one of our modules in a plain loop.

    Args:
        module: The module.
        config: Configuration, of which the temperatures are read.
        evaluate: See :class:`Training`.
        own_loss: Name of the task's own loss, None for clustering.
    """

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        batch = {"x": x, "y": y}
        values = module.losses(module(batch), batch)
        return values["loss"], None if own_loss is None else values[own_loss].detach()

    start, end = config.get("temperature", (0.1, 0.005))
    return Training(
        module,
        losses,
        lambda x: module({"x": x}),
        evaluate,
        module.configure_optimizers(),
        {"*": (start, end), **config.get("temperatures", {})},
    )


def clustering(config: Config, data: Data) -> Training:
    """Digits by the quantization loss alone, by one level of prototypes or two."""
    rho, encoder = config.get("rho", 0.0), config.get("encoder", "pca")
    codes = 10
    head: Head
    if encoder == "patches":
        backbone: Backbone = PatchPCABackbone(data.x)
        absolute = [Temperature(value, "absolute") for value in config.get("absolute", ())]
        head = HierarchicalReadout(
            [32, codes], temperature=absolute or [0.1, 0.1], tokens=["all", "joined"], num_tokens=9
        )
    else:
        pca = encoder == "pca"
        backbone = PCABackbone(64, 16, trainable=rho > 0) if pca else MLPBackbone(64, config.get("dim", 8))
        if isinstance(backbone, PCABackbone):
            backbone.fit(data.x)
        head = DDCLReadout(
            codes,
            embedding_scale=config.get("scale", "auto"),
            detach_assignments=config.get("detach", False),
            repulsion=config.get("repulsion", 0.0),
        )
    module = DDCLReadoutModule(
        backbone,
        head,
        Clustering(10),
        lr_prototypes=config.get("rate", 1e-2),
        rho=rho,
        prototype_optimizer=OptimizerConfig(config.get("optimizer", "Adam")),
        allow_unstable=rho >= 1,
    )

    def evaluate(x: Tensor, y: Tensor) -> dict[str, float]:
        return clustering_quality(module({"x": x}).assignments[:, 0].argmax(-1), y, codes)

    training = readout_training(module, config, evaluate, None)
    training.meaningful_start = encoder != "mlp"
    if config.get("absolute"):
        training.schedules = {}
    return training


def classification(config: Config, data: Data) -> Training:
    """Labelled images through prototypes."""
    rate = config.get("rate", 1e-3)
    pooling = config.get("pooling", "both")
    module = DDCLReadoutModule(
        ConvBackbone(data.x.shape[1], 32, WIDTHS),
        DDCLReadout(config.get("codes", 32), pooling=pooling),
        Classification(10, quantization_weight=config.get("weight", 0.1)),
        lr_prototypes=10 * rate,
        rho=0.1,
        lr_task=rate,
    )

    def evaluate(x: Tensor, y: Tensor) -> dict[str, float]:
        logits = module.task.logits(module({"x": x, "y": y}))
        accuracy = float((logits.argmax(-1) == y).float().mean())
        majority = float(torch.bincount(y).max()) / len(y)
        return {"accuracy": (accuracy - majority) / (1 - majority)}

    return readout_training(module, {"temperature": (0.1, 0.02), **config}, evaluate, "cross_entropy")


def create_quantizer(config: Config, variance: float) -> Head:
    """The bottleneck of an autoencoder whose images have this variance."""
    method, codes = config["method"], config["codes"]
    bonus = 64 / codes * variance
    if method == "soft":
        soft_output = {"training_output": "soft", "gradient": "soft"} if config.get("soft_output") else {}
        commitment = config.get("commitment", 0.1) * variance
        return SoftVQ(codes, commitment_weight=commitment, entropy_weight=0.01 * bonus, **soft_output)
    if method == "standardized":
        return SoftVQ(
            codes,
            commitment_weight=0.25 * variance,
            entropy_weight=0.04 * bonus,
            embedding_scale="per_dimension",
            code_dim=8 if codes <= 64 else None,
        )
    if method == "paper":
        options: Any = {"training_output": "soft", "gradient": "soft"}
        return SoftVQ(codes, commitment_weight=0.25 * variance, entropy_weight=0.0, **options)
    if method == "vqvae":
        return VQPooling(codes, weight=variance, init=config.get("init", "uniform"))
    name, arguments = LIBRARY[method]
    sizes = {"levels": config["levels"]} if name == "FSQ" else {"codebook_size": codes}
    return LibraryVQ(name, {**sizes, **arguments, **config.get("arguments", {})}, weight=variance)


def autoencoder(config: Config, data: Data) -> Training:
    """Images through a codebook and back."""
    channels, variance = data.x.shape[1], float(data.x.var())
    method, rate, codes = config["method"], config.get("rate", RATE), config["codes"]
    token_normalized = method in ("soft", "standardized")
    rate_of_codes = max(0.05 if token_normalized else 10 * RATE, 2 * rate)
    optimizer = OptimizerConfig("TokenNormalized", {"relocation_threshold": 0.5}) if token_normalized else "Adam"
    module = DDCLReadoutModule(
        ConvBackbone(channels, DIM, WIDTHS),
        create_quantizer(config, variance),
        Reconstruction(ConvDecoder(channels, WIDTHS), quantization_weight=0.0),
        prototype_optimizer=optimizer,
        lr_prototypes=rate_of_codes,
        rho=rate / rate_of_codes,
        lr_task=rate,
    )

    def evaluate(x: Tensor, y: Tensor) -> dict[str, float]:
        x = x[:TEST_IMAGES]
        return reconstruction_quality(module.task.decode(module({"x": x}).tokens), x)

    start = 0.05 if method == "paper" else min(0.2, 0.05 * 64 / codes)
    return readout_training(module, {"temperature": (start, start / 100), **config}, evaluate, "reconstruction")


@torch.no_grad()
def move_far(training: Training) -> None:
    """Move the codes of the library's VectorQuantize away from the tokens."""
    layer: Any = training.model.head.quantizer.layer  # type: ignore[union-attr]
    codebook = layer._codebook
    shift = FAR * codebook.embed.var(1).sum(-1).sqrt().view(-1, 1, 1)
    codebook.embed.add_(shift)
    codebook.embed_avg.add_(shift * codebook.cluster_size.unsqueeze(-1))
