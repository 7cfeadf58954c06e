"""Prototypes inside a network (section 8.7 of the paper): what each option changes on a small task.

Four tasks on scikit-learn's 1,797 digits, of which 360 are for testing; the split goes with the seed.

* ``network``: a transformer from scratch (16 patches of 2 x 2 pixels, dimension 32, 2 pre-norm blocks of 4 heads, mean
  token, linear classifier) with and without prototypes after, beside and inside its blocks, trained on the
  cross-entropy and 0.01 of L_q. Accuracy on clean and on noisy test images (noise of a quarter of a pixel's range),
  parameters, entropy of the assignments, share of the codes in use.
* ``pretrained``: the same network, trained on the digits 0 to 4 and then frozen: what a new linear classifier makes of
  all ten digits, alone, with gated prototypes beside the blocks, with residual ones after them, and with a gated
  bottleneck of the same size in the place of prototypes.
* ``sampling``: the network with its last tokens as mixtures of prototypes, of which training reads a sample or not;
  test accuracy from the mixtures and from hard codes.
* ``context``: a bank alone on two domains (digits, and digits made brighter, inverted or rotated) whose context says
  which one a sample is of: squared distance to the nearest prototype over the total variance, at equal K.

    python benchmarks/placement.py                # about 10 minutes on one core; goes on where it was stopped
    python benchmarks/placement.py --quick

Writes ``placement.json``.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from _common import load, options, plus_minus, quiet_trainer, save
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import (
    DDCLAttention,
    GatedPrototypes,
    PrototypeBank,
    PrototypeNorm,
    SerialPrototypes,
    find_banks,
    insert_prototypes,
    quantization_loss,
    two_timescale_groups,
)
from ddcl_lightning.adapters.base import PlacedPrototypes
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization
from ddcl_lightning.functional import assignment_statistics, critical_temperature
from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks

SEEDS = tuple(range(5))
DIM, HEADS, DEPTH, TOKENS = 32, 4, 2, 16
PROTOTYPES = 16  # after and beside blocks; 8 in a norm
EPOCHS, BATCH, RATE, RHO = 30, 64, 3e-3, 0.3
WEIGHT = 0.01  # of L_q
TEST, NOISE = 360, 0.25
FRACTION = {"temperature": 0.1, "temperature_unit": "critical"}
CONTEXT_STEPS, COMPONENTS = 600, 16

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


class GatedAdapter(nn.Module):
    """A bottleneck as large as 16 prototypes, behind the same gate, in their place: a control."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.gate = block, GatedPrototypes(DDCLAttention(DIM, 1)).gate
        self.bottleneck = nn.Sequential(
            nn.Linear(DIM, PROTOTYPES // 2, bias=False), nn.GELU(), nn.Linear(PROTOTYPES // 2, DIM, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, DIM)`` to the same."""
        return self.block(x) + torch.tanh(self.gate(x)) * self.bottleneck(x)


def after(blocks: range, create: Callable[[], PlacedPrototypes]) -> Transformer:
    """The network with prototypes at some blocks."""
    net = Transformer()
    insert_prototypes(net, [f"blocks.{i}" for i in blocks], create)
    return net


def shared() -> Transformer:
    """Residual prototypes after every block, from one bank."""
    bank = PrototypeBank(PROTOTYPES, DIM, **FRACTION)
    return after(range(DEPTH), lambda: SerialPrototypes(DDCLAttention(DIM, bank=bank, residual=True)))


def layer(**kwargs: Any) -> DDCLAttention:
    return DDCLAttention(DIM, PROTOTYPES, **{**FRACTION, **kwargs})


def heads(fractions: list[float]) -> Transformer:
    """Residual prototypes after every block, in heads whose temperatures are fractions of their own critical ones."""

    def create() -> SerialPrototypes:
        placed = SerialPrototypes(layer(residual=True, num_heads=len(fractions)))
        placed.layer.bank.set_temperature(torch.tensor(fractions))
        return placed

    return after(range(DEPTH), create)


NETWORKS: dict[str, Callable[[], Transformer]] = {
    "plain (LayerNorm)": Transformer,
    "plain, wider": lambda: Transformer(hidden=2 * DIM + 24),  # as large as with residual prototypes
    "serial, mixture, every block": lambda: after(range(DEPTH), lambda: SerialPrototypes(layer())),
    "serial, mixture, last block": lambda: after(range(DEPTH - 1, DEPTH), lambda: SerialPrototypes(layer())),
    "serial, residual, every block": lambda: after(range(DEPTH), lambda: SerialPrototypes(layer(residual=True))),
    "serial, residual, one shared bank": shared,
    "serial, residual, 4 heads, T = 0.1 T_c": lambda: heads(4 * [0.1]),
    "serial, residual, 4 heads, T from 0.02 to 0.5 T_c": lambda: heads([0.02, 0.06, 0.17, 0.5]),
    "gated, every block": lambda: after(range(DEPTH), lambda: GatedPrototypes(layer())),
    "RMSNorm": lambda: Transformer(lambda: nn.RMSNorm(DIM)),
    "PrototypeNorm, T = 0.1 T_c": lambda: Transformer(lambda: PrototypeNorm(DIM, 8, temperature=0.1)),
    "PrototypeNorm, T = 0.5 T_c": lambda: Transformer(lambda: PrototypeNorm(DIM, 8)),
}
ADDED: dict[str, Callable[[], PlacedPrototypes]] = {
    "gated, every block": lambda: GatedPrototypes(layer()),
    "serial, residual, every block": lambda: SerialPrototypes(layer(residual=True)),
}
SAMPLING = {
    "soft, T = 0.03 T_c": {"temperature": 0.03},
    "sampling, T = 0.03 T_c": {"temperature": 0.03, "sampling": True},
    "soft, T = 0.3 T_c": {"temperature": 0.3},
    "sampling, T = 0.3 T_c": {"temperature": 0.3, "sampling": True},
}
# K, the start of the temperature as a fraction of T_c, whether the bank knows the context.
CONTEXT = {
    "K = 10": (10, 0.1, False),
    "K = 20": (20, 0.1, False),
    "K = 10, from T_c": (10, 1.0, False),
    "K = 10, context, from 0.1 T_c": (10, 0.1, True),
    "K = 10, context, from T_c": (10, 1.0, True),
}
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "brighter": lambda x: 0.5 + 0.5 * x,
    "inverted": lambda x: 1 - x,
    "rotated": lambda x: x.rot90(1, (1, 2)),
}


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(N, 64)`` in [0, 1] and labels, test images and labels."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST], order[TEST:]
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


def look(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Entropy over ln K and share of the codes in use, means over the calls of the banks."""
    seen: list[CodebookRecord] = []
    with torch.no_grad(), record_codebooks(find_banks(net), lambda name, observed: seen.append(observed)):
        net(x)
    entropy, used = [], []
    for observed in seen:
        found = assignment_statistics(observed.tokens, observed.codebook, observed.temperature)
        entropy.append(float(found.entropy.mean()) / math.log(found.counts.shape[-1]))
        used.append(float((found.counts > 0).double().mean()))
    return {"entropy": sum(entropy) / len(seen), "usage": sum(used) / len(seen)} if seen else {}


def run_network(name: str, seed: int, epochs: int) -> dict[str, Any]:
    net, (x, y, test_x, test_y) = NETWORKS[name](), digits(seed)
    check = train(net, x, y, epochs)
    generator = torch.Generator().manual_seed(seed)
    noisy = [accuracy(net, test_x + NOISE * torch.randn(test_x.shape, generator=generator), test_y) for _ in range(5)]
    return {
        "acc": accuracy(net, test_x, test_y),
        "noisy": sum(noisy) / len(noisy),
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        **look(net, test_x),
        "checks": check.checks,
        "violations": check.violations,
    }


def run_pretrained(name: str, seed: int, epochs: int) -> dict[str, Any]:
    x, y, test_x, test_y = digits(seed)
    net = Transformer(classes=5)
    few = y < 5
    train(net, x[few], y[few], epochs)
    net.train().requires_grad_(False)
    before = net(x).detach()
    placed: list[PlacedPrototypes] = []
    if name == "gated adapter, every block":
        net.blocks = nn.ModuleList(GatedAdapter(block) for block in net.blocks)
    elif name != "classifier alone":
        placed = insert_prototypes(net, [f"blocks.{i}" for i in range(DEPTH)], ADDED[name])
    changed = float((net(x) - before).abs().max().detach())
    net.classifier = nn.Linear(DIM, 10)
    train(net, x, y, epochs)
    result: dict[str, Any] = {
        "acc": accuracy(net, test_x, test_y),
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        "changed": changed,
    }
    openings: list[Tensor] = []
    for part in placed:
        if isinstance(part, GatedPrototypes):
            part.gate.register_forward_hook(lambda *call: openings.append(torch.tanh(call[2])))
    accuracy(net, test_x, test_y)
    if openings:
        result["opening"] = float(torch.cat(openings).abs().mean())
    return result


def run_sampling(name: str, seed: int, epochs: int) -> dict[str, Any]:
    x, y, test_x, test_y = digits(seed)
    net = after(range(DEPTH - 1, DEPTH), lambda: SerialPrototypes(layer(**SAMPLING[name])))
    check = train(net, x, y, epochs)
    result = {"acc": accuracy(net, test_x, test_y), **look(net, test_x)}
    (bank,) = find_banks(net).values()
    bank.set_temperature(1e-6)
    return {**result, "hard": accuracy(net, test_x, test_y), "checks": check.checks, "violations": check.violations}


def run_context(name: str, seed: int, steps: int, domain: str) -> dict[str, Any]:
    size, start, knows = CONTEXT[name]
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    both = torch.cat([images.flatten(1), DOMAINS[domain](images).flatten(1)])
    context = torch.eye(2).repeat_interleave(len(images), 0)
    centred = both - both.mean(0)
    z = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:COMPONENTS].T
    attention = DDCLAttention(COMPONENTS, size, context_dim=2 if knows else None)
    found = KMeans(size, n_init=1, random_state=seed).fit(z.numpy()).cluster_centers_
    attention.bank.set_prototypes(torch.tensor(found, dtype=torch.float32).unsqueeze(0))
    critical, end = float(critical_temperature(z.unsqueeze(0))), 0.005
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.02)
    for step in range(steps):
        attention.bank.set_temperature(critical * max(end, start * (end / start) ** (step / (0.8 * steps))))
        rows = torch.randint(len(z), (256,))
        output = attention(z[rows].unsqueeze(1), context=context[rows] if knows else None)
        optimizer.zero_grad()
        output.terms.loss.sum().backward()
        optimizer.step()
    with torch.no_grad():
        moved = attention(z.unsqueeze(1), context=context if knows else None).embedded[:, 0]
        distances = torch.cdist(moved, attention.bank.prototypes[0]).amin(1).square()
        parameters = sum(parameter.numel() for parameter in attention.parameters())
        return {"error": float(distances.mean() / z.square().sum(1).mean()), "parameters": parameters}


Run = Callable[[str, int, int], dict[str, Any]]
TASKS: dict[str, tuple[Run, tuple[str, ...], int]] = {
    "network": (run_network, tuple(NETWORKS), EPOCHS),
    "pretrained": (run_pretrained, ("classifier alone", *ADDED, "gated adapter, every block"), EPOCHS),
    "sampling": (run_sampling, tuple(SAMPLING), EPOCHS),
    **{
        f"context, {domain}": (
            lambda name, seed, steps, domain=domain: run_context(name, seed, steps, domain),
            tuple(CONTEXT),
            CONTEXT_STEPS,
        )
        for domain in DOMAINS
    },
}


def table(task: str, runs: list[dict[str, Any]]) -> str:
    """The rows of a task as Markdown."""
    known = ("acc", "noisy", "hard", "error", "entropy", "usage", "opening", "parameters", "seconds")
    columns = [key for key in known if any(key in run for run in runs)]
    lines = [f"| {task} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        cells = []
        for key in columns:
            values = [run[key] for run in mine if key in run]
            if key == "parameters":
                cells.append(f"{values[0]:,}")
            else:
                cells.append(plus_minus(values, 1 if key == "seconds" else 3) if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    args = options(__doc__).parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*smaller than the logging|.*LeafSpec")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    result = {} if args.quick else load(args.output, "placement")
    result.pop("versions", None)
    result["settings"] = {
        "network": {"dim": DIM, "heads": HEADS, "depth": DEPTH, "tokens": TOKENS, "prototypes": PROTOTYPES},
        "training": {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "rho": RHO, "weight": WEIGHT},
        "context": {"steps": CONTEXT_STEPS, "components": COMPONENTS},
    }
    for task, (run, names, length) in TASKS.items():
        runs = result.setdefault(task, [])
        for seed in SEEDS[: 1 if args.quick else None]:
            for name in names:
                if any(found["name"] == name and found["seed"] == seed for found in runs):
                    continue
                pl.seed_everything(seed, verbose=False)
                start = time.process_time()
                found = run(name, seed, 1 if args.quick else length)
                seconds = round(time.process_time() - start, 1)
                runs.append({"name": name, "seed": seed, **found, "seconds": seconds})
                save(args.output, "placement", result)
                print(task, runs[-1], flush=True)
        print(table(task, runs))


if __name__ == "__main__":
    main()
