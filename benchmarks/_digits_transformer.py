"""A small transformer for scikit-learn's digits, and how it is trained with and without prototypes in it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from _measure import quiet_trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import find_banks, quantization_loss, two_timescale_groups
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization

DIM, HEADS, DEPTH, TOKENS = 32, 4, 2, 16
BATCH, RATE, RHO = 64, 3e-3, 0.3
WEIGHT = 0.01  # of L_q
TEST = 360  # images

Norm = Callable[[], nn.Module]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, norm: Norm, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, hidden), nn.GELU(), nn.Linear(hidden, DIM))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, DIM)`` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Images ``(B, 64)`` to logits."""

    def __init__(self, norm: Norm = lambda: nn.LayerNorm(DIM), classes: int = 10, hidden: int = 2 * DIM) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, DIM), nn.Parameter(0.02 * torch.randn(TOKENS, DIM))
        self.blocks = nn.ModuleList(Block(norm, hidden) for _ in range(DEPTH))
        self.norm, self.classifier = norm(), nn.Linear(DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, TOKENS, 4)
        z = self.embed(patches) + self.place
        for block in self.blocks:
            z = block(z)
        return self.classifier(self.norm(z).mean(1))


class Training(pl.LightningModule):
    """Cross-entropy, and L_q where there are prototypes; the rates fall to zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.placed = bool(find_banks(net))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One loss."""
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        return loss + WEIGHT * quantization_loss(self.net) if self.placed else loss

    def configure_optimizers(self) -> Any:
        """Prototypes at ``RATE / RHO``, everything else at ``RATE``."""
        groups = two_timescale_groups(self, RATE / RHO, RHO) if self.placed else self.parameters()
        optimizer = torch.optim.Adam(groups, lr=RATE)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits(seed: int, limit: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(N, 64)`` in [0, 1] and labels, test images and labels; of each at most ``limit``."""
    loaded = load_digits()
    x, y = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST][:limit], order[TEST:][:limit]
    return x[train], y[train], x[test], y[test]


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> DecompositionCheck:
    """Fit a network; prototypes start by k-means."""
    check = DecompositionCheck(every_n_batches=50)
    callbacks = [KMeansInitialization(num_restarts=1, max_tokens=4096, progress=False), check]
    trainer = quiet_trainer(epochs, callbacks if find_banks(net) else [], limit_val_batches=0)
    trainer.fit(Training(net), DataLoader(TensorDataset(x, y), BATCH, shuffle=True))
    net.eval()
    return check


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) == y).double().mean())
