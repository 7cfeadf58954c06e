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

    python benchmarks/adapters.py                # about 10 minutes on one core
"""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from _digits_transformer import (
    BATCH,
    DEPTH,
    DIM,
    HEADS,
    RATE,
    RHO,
    TOKENS,
    WEIGHT,
    Norm,
    Transformer,
    accuracy,
    digits,
    train,
)
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, extreme, mean, same
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddcl_lightning import (
    DDCLAttention,
    GatedPrototypes,
    PrototypeBank,
    PrototypeNorm,
    SerialPrototypes,
    find_banks,
    insert_prototypes,
)
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.functional import assignment_statistics, critical_temperature
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks

PROTOTYPES = 16  # after and beside blocks; 8 in a norm
EPOCHS, NOISE = 30, 0.25
CONTEXT_STEPS, COMPONENTS = 600, 16


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


# Label and configuration by id. ``place`` says what is put where, ``fractions`` are T / T_c of the heads.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain (LayerNorm)", {}),
    "plain-wider": ("plain, wider hidden layers", {"hidden": 2 * DIM + 24}),  # as large as with residual prototypes
    "mixture-every": ("serial, mixture, every block", {"place": "serial", "residual": False}),
    "mixture-last": ("serial, mixture, last block", {"place": "serial", "residual": False, "blocks": "last"}),
    "residual-every": ("serial, residual, every block", {"place": "serial", "residual": True}),
    "residual-shared": ("serial, residual, one shared bank", {"place": "serial", "residual": True, "shared": True}),
    "residual-heads": (
        "serial, residual, 4 heads, T = 0.1 T_c",
        {"place": "serial", "residual": True, "fractions": [0.1, 0.1, 0.1, 0.1]},
    ),
    "residual-heads-spread": (
        "serial, residual, 4 heads, T from 0.02 to 0.5 T_c",
        {"place": "serial", "residual": True, "fractions": [0.02, 0.06, 0.17, 0.5]},
    ),
    "gated": ("gated, every block", {"place": "gated"}),
    "rms-norm": ("RMSNorm", {"norm": "rms"}),
    "prototype-norm-0.1": ("PrototypeNorm, T = 0.1 T_c", {"norm": "prototype", "temperature": 0.1}),
    "prototype-norm-0.5": ("PrototypeNorm, T = 0.5 T_c", {"norm": "prototype", "temperature": 0.5}),
}
PRETRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("nothing", {}),
    "gated": ("gated prototypes beside every block", {"place": "gated"}),
    "bottleneck": ("gated bottleneck of the same size beside every block", {"place": "bottleneck"}),
    "residual": ("residual prototypes after every block", {"place": "serial", "residual": True}),
}
SAMPLING: dict[str, tuple[str, dict[str, Any]]] = {
    "soft-0.03": ("mixtures, T = 0.03 T_c", {"temperature": 0.03, "sampling": False}),
    "sampling-0.03": ("samples, T = 0.03 T_c", {"temperature": 0.03, "sampling": True}),
    "soft-0.3": ("mixtures, T = 0.3 T_c", {"temperature": 0.3, "sampling": False}),
    "sampling-0.3": ("samples, T = 0.3 T_c", {"temperature": 0.3, "sampling": True}),
}
# K, the start of the temperature as a fraction of T_c, whether the bank knows the context.
CONTEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "10": ("K = 10", {"size": 10, "start": 0.1, "context": False}),
    "10-hot": ("K = 10, T from T_c", {"size": 10, "start": 1.0, "context": False}),
    "10-context": ("K = 10, context, T from 0.1 T_c", {"size": 10, "start": 0.1, "context": True}),
    "10-context-hot": ("K = 10, context, T from T_c", {"size": 10, "start": 1.0, "context": True}),
    "20": ("K = 20", {"size": 20, "start": 0.1, "context": False}),
}
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "brighter": lambda x: 0.5 + 0.5 * x,
    "inverted": lambda x: 1 - x,
    "rotated": lambda x: x.rot90(1, (1, 2)),
}


CASES = {
    **{f"network/{name}": Case(label, {"task": "network", **config}) for name, (label, config) in NETWORKS.items()},
    **{
        f"pretrained/{name}": Case(label, {"task": "pretrained", **config})
        for name, (label, config) in PRETRAINED.items()
    },
    **{f"sampling/{name}": Case(label, {"task": "sampling", **config}) for name, (label, config) in SAMPLING.items()},
    **{
        f"context/{domain}/{name}": Case(label, {"task": "context", "domain": domain, **config})
        for domain in DOMAINS
        for name, (label, config) in CONTEXT.items()
    },
}


def create_network(config: Config) -> Transformer:
    """A network from scratch, with what the configuration adds."""
    norms: dict[str, Norm] = {
        "layer": lambda: nn.LayerNorm(DIM),
        "rms": lambda: nn.RMSNorm(DIM),
        "prototype": lambda: PrototypeNorm(DIM, 8, temperature=config["temperature"]),
    }
    net = Transformer(norms[config.get("norm", "layer")], hidden=config.get("hidden", 2 * DIM))
    if "place" in config:
        blocks = range(DEPTH - 1 if config.get("blocks") == "last" else 0, DEPTH)
        place(net, blocks, config)
    return net


def place(net: Transformer, blocks: range, config: Config) -> list[PrototypeAdapter]:
    """Put prototypes after blocks, or gated ones beside them."""
    shared = PrototypeBank(PROTOTYPES, DIM) if config.get("shared") else None

    def create() -> PrototypeAdapter:
        if config["place"] == "gated":
            return GatedPrototypes(layer())
        if shared is not None:
            return SerialPrototypes(DDCLAttention(DIM, bank=shared, residual=True))
        fractions = config.get("fractions", [])
        placed = SerialPrototypes(layer(residual=config["residual"], num_heads=len(fractions) or 1))
        if fractions:
            placed.layer.bank.set_temperature(fractions)
        return placed

    return insert_prototypes(net, [f"blocks.{i}" for i in blocks], create)


def layer(**kwargs: Any) -> DDCLAttention:
    return DDCLAttention(DIM, PROTOTYPES, **kwargs)


def bank_statistics(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Entropy over ln K and share of the codes in use, means over the calls of the banks."""
    calls: list[BankRecord] = []
    with torch.no_grad(), record_codebooks(find_banks(net), lambda name, observation: calls.append(observation)):
        net(x)
    entropy, usage = [], []
    for call in calls:
        statistics = assignment_statistics(call.tokens, call.codebook, call.temperature)
        entropy.append(float(statistics.entropy.mean()) / math.log(statistics.counts.shape[-1]))
        usage.append(float((statistics.counts > 0).double().mean()))
    return {"entropy": sum(entropy) / len(calls), "usage": sum(usage) / len(calls)} if calls else {}


def run_network(config: Config, seed: int, epochs: int, limit: int | None) -> Run:
    net, (x, y, test_x, test_y) = create_network(config), digits(seed, limit)
    check = train(net, x, y, epochs)
    generator = torch.Generator().manual_seed(seed)
    noisy = [accuracy(net, test_x + NOISE * torch.randn(test_x.shape, generator=generator), test_y) for _ in range(5)]
    return {
        "acc": accuracy(net, test_x, test_y),
        "noisy": sum(noisy) / len(noisy),
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        **bank_statistics(net, test_x),
        "checks": check.checks,
        "violations": check.violations,
    }


def run_pretrained(config: Config, seed: int, epochs: int, limit: int | None) -> Run:
    x, y, test_x, test_y = digits(seed, limit)
    net = Transformer(classes=5)
    few = y < 5
    train(net, x[few], y[few], epochs)
    net.train().requires_grad_(False)
    before = net(x).detach()
    placed: list[PrototypeAdapter] = []
    if config.get("place") == "bottleneck":
        net.blocks = nn.ModuleList(GatedAdapter(block) for block in net.blocks)
    elif "place" in config:
        placed = place(net, range(DEPTH), config)
    changed = float((net(x) - before).abs().max().detach())
    net.classifier = nn.Linear(DIM, 10)
    train(net, x, y, epochs)
    result: Run = {
        "acc": accuracy(net, test_x, test_y),
        "parameters": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        "changed": changed,
    }
    gate_values: list[Tensor] = []
    for adapter in placed:
        if isinstance(adapter, GatedPrototypes):
            adapter.gate.register_forward_hook(lambda *call: gate_values.append(torch.tanh(call[2])))
    accuracy(net, test_x, test_y)
    if gate_values:
        result["gate_value"] = float(torch.cat(gate_values).abs().mean())
    return result


def run_sampling(config: Config, seed: int, epochs: int, limit: int | None) -> Run:
    x, y, test_x, test_y = digits(seed, limit)
    net = Transformer()
    options = {key: config[key] for key in ("temperature", "sampling")}
    insert_prototypes(net, [f"blocks.{DEPTH - 1}"], lambda: SerialPrototypes(layer(**options)))
    check = train(net, x, y, epochs)
    result = {"acc": accuracy(net, test_x, test_y), **bank_statistics(net, test_x)}
    (bank,) = find_banks(net).values()
    bank.set_temperature(1e-6)
    return {**result, "hard": accuracy(net, test_x, test_y), "checks": check.checks, "violations": check.violations}


def run_context(config: Config, seed: int, steps: int, limit: int | None) -> Run:
    size, start, knows = config["size"], config["start"], config["context"]
    images = torch.tensor(load_digits().images[:limit], dtype=torch.float32) / 16
    both = torch.cat([images.flatten(1), DOMAINS[config["domain"]](images).flatten(1)])
    context = torch.eye(2).repeat_interleave(len(images), 0)
    centred = both - both.mean(0)
    z = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:COMPONENTS].T
    attention = DDCLAttention(COMPONENTS, size, context_dim=2 if knows else None)
    centres = KMeans(size, n_init=1, random_state=seed).fit(z.numpy()).cluster_centers_
    attention.bank.set_prototypes(torch.tensor(centres, dtype=torch.float32).unsqueeze(0))
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


TASKS: dict[str, tuple[Callable[[Config, int, int, int | None], Run], int]] = {
    "network": (run_network, EPOCHS),
    "pretrained": (run_pretrained, EPOCHS),
    "sampling": (run_sampling, EPOCHS),
    "context": (run_context, CONTEXT_STEPS),
}


def run(config: Config, seed: int, options: Options) -> Run:
    """One case of one task."""
    torch.set_flush_denormal(True)
    pl.seed_everything(seed, verbose=False)
    measure, length = TASKS[config["task"]]
    return measure(config, seed, 1, 3 * BATCH) if options.quick else measure(config, seed, length, None)


def task_table(results: Results, task: str, first: str, columns: tuple[str, ...]) -> Table:
    return results.table(first, results.where(task=task), {title: COLUMNS[title] for title in columns})


COLUMNS = {
    "accuracy": mean("acc"),
    "noisy": mean("noisy"),
    "hard": mean("hard"),
    "H / ln K": mean("entropy", ".2f", deviation=False),
    "usage": mean("usage", ".2f", deviation=False),
    "parameters": same("parameters", ","),
    "trained parameters": same("parameters", ","),
    "seconds": mean("seconds", ".1f", deviation=False),
    "change of the outputs": extreme(max, "changed", ".2g"),
    "mean gate": mean("gate_value", ".2f", deviation=False),
}
NETWORK = ("accuracy", "noisy", "H / ln K", "usage", "parameters", "seconds")


def context_table(results: Results) -> Table:
    rows = [["bank", *DOMAINS, "parameters"]]
    for name, (label, _) in CONTEXT.items():
        by_domain = [results.of(f"context/{domain}/{name}") for domain in DOMAINS]
        runs = next(filter(None, by_domain), [])
        rows.append([label, *map(mean("error"), by_domain), same("parameters", ",")(runs)])
    return rows


STUDY = Study(
    "adapters",
    CASES,
    run,
    {
        "network": lambda results: task_table(results, "network", "network", NETWORK),
        "pretrained": lambda results: task_table(
            results, "pretrained", "added", ("accuracy", "trained parameters", "change of the outputs", "mean gate")
        ),
        "sampling": lambda results: task_table(
            results, "sampling", "training reads", ("accuracy", "hard", "H / ln K", "usage")
        ),
        "context": context_table,
    },
    seeds=range(5),
    settings={
        "network": {"dim": DIM, "heads": HEADS, "depth": DEPTH, "tokens": TOKENS, "prototypes": PROTOTYPES},
        "training": {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "rho": RHO, "weight": WEIGHT},
        "context": {"steps": CONTEXT_STEPS, "components": COMPONENTS},
    },
)

if __name__ == "__main__":
    STUDY.main(__doc__)
