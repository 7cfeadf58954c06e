"""Prototypes in the place of the MLPs of a real text encoder: error, accuracy, parameters and time.

The MLPs of one block or of all are replaced and distilled on SST-2 phrases, without labels; then logistic regression is
trained on the mean token of other phrases and tested on the validation sentences. Beside DDCLFeedForward, at the same
parameters and by the same distillation: a narrower MLP, and a single linear layer, which needs fewer. Each starts from
least squares as well as it can (the narrow MLP from a random first layer).

    python benchmarks/feedforward.py --encoder FOLDER --texts FOLDER           # 20 minutes of one free core
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, interval, mean
from torch import Tensor, nn
from torch.nn.functional import gelu

from ddcl_lightning.adapters.distillation import distill_feedforward
from ddcl_lightning.adapters.feedforward import DDCLFeedForward, ridge_regression
from ddcl_lightning.adapters.replacement import replace_feedforward
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.datamodules import SST2DataModule
from ddcl_lightning.metrics.probing import linear_probe

PHRASES, PROBE, STEPS, BATCH_TOKENS = 3000, 4000, 500, 256
LR = 1e-2  # the best of 3e-3, 1e-2 and 2e-2 for prototypes and the narrow MLP alike
TIMED = (32, 64)  # samples and tokens of the timed call
MLP = "mlp"
# Label, fraction of the MLP's parameters, configuration (heads of 16 prototypes of dimension 8, or the width of the
# narrow MLP, both per D), seeds with one block replaced, seeds with all.
METHODS: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    MLP: ("the MLP itself", "1", {"layer": "original"}, 1, 1),
    "prototypes-1/4": ("prototypes", "1/4", {"layer": "prototypes", "heads": 1 / 16}, 3, 3),
    "narrow-1/4": ("narrow MLP", "1/4", {"layer": "mlp", "width": 1.0}, 3, 3),
    "linear": ("linear", "1/8", {"layer": "linear"}, 1, 1),
    # What the linear path has cost goes into heads.
    "prototypes-no-linear": (
        "prototypes, no linear path",
        "1/4",
        {"layer": "prototypes", "heads": 1 / 8, "linear": False},
        1,
        0,
    ),
    "prototypes-1/2": ("prototypes", "1/2", {"layer": "prototypes", "heads": 3 / 16}, 1, 0),
    "narrow-1/2": ("narrow MLP", "1/2", {"layer": "mlp", "width": 2.0}, 1, 0),
    "prototypes-1": ("prototypes", "1", {"layer": "prototypes", "heads": 7 / 16}, 1, 0),
    "narrow-1": ("narrow MLP", "1", {"layer": "mlp", "width": 4.0}, 1, 0),
    "prototypes-original-tokens": (
        "prototypes, distilled on the original model's tokens",
        "1/4",
        {"layer": "prototypes", "heads": 1 / 16, "sequential": False},
        0,
        1,
    ),
}
NEEDS = ("encoder", "texts")
CASES = {
    **{
        f"{blocks}/{name}": Case(label, {"measure": "error", "blocks": blocks, **config}, NEEDS, range(seeds))
        for name, (label, _, config, *numbers) in METHODS.items()
        for blocks, seeds in zip(("one", "all"), numbers, strict=True)
        if seeds
    },
    "time": Case("one call", {"measure": "time", "layers": {name: METHODS[name][2] for name in METHODS}}, NEEDS),
}


class NarrowMLP(nn.Module):
    """The baseline of the same size."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(*, D)`` to ``(*, D)``."""
        result: Tensor = self.down(gelu(self.up(tokens)))
        return result

    def start_from(self, tokens: Tensor, targets: Tensor, **_: Any) -> None:
        """The second layer by least squares."""
        _assign(self.down, gelu(self.up(tokens)), targets)


class Linear(nn.Linear):
    """A linear layer that starts where least squares puts it."""

    def start_from(self, tokens: Tensor, targets: Tensor, **_: Any) -> None:
        """Solved outright."""
        _assign(self, tokens, targets)


@torch.no_grad()
def _assign(layer: nn.Linear, features: Tensor, targets: Tensor) -> None:
    weight, bias = ridge_regression(features, targets)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def creator(config: Config) -> Callable[[int], nn.Module]:
    """Function that creates a layer for D."""
    if config["layer"] == "linear":
        return lambda dim: Linear(dim, dim)
    if config["layer"] == "mlp":
        return lambda dim: NarrowMLP(dim, int(config["width"] * dim))
    linear = config.get("linear", True)
    return lambda dim: DDCLFeedForward(dim, num_heads=max(1, int(config["heads"] * dim)), linear=linear)


class Bench:
    """One encoder and its texts."""

    def __init__(self, options: Options) -> None:
        phrases, num_probe, evaluated = (40, 60, 20) if options.quick else (PHRASES, PROBE, None)
        self.backbone = TransformersBackbone(str(options.encoder), tokens="mean", max_length=64)
        self.model: nn.Module = self.backbone.encoder
        data = SST2DataModule(path=str(options.texts / "sst2_glue.jsonl.gz"), batch_size=64)
        data.setup()
        train = _texts(data.train_dataloader(), phrases + num_probe)
        self.test = _texts(data.val_dataloader(), evaluated)
        self.distilled, self.probed = train[:phrases], train[phrases:]
        self.batches = [
            dict(zip(("input_ids", "attention_mask"), self.backbone._tokenize(texts), strict=True))
            for texts in _sorted_batches([text for text, _ in self.distilled])
        ]

    def accuracy(self) -> float:
        """Of logistic regression on the mean token."""
        (x, y), (test_x, test_y) = self._features(self.probed), self._features(self.test)
        return linear_probe(x, y, test_x, test_y).acc

    @torch.no_grad()
    def _features(self, rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        rows = sorted(rows, key=lambda row: len(row[0]))
        vectors = [self.backbone.encode(texts).values[:, 0] for texts in _sorted_batches([text for text, _ in rows])]
        return torch.cat(vectors), torch.tensor([label for _, label in rows])


def _texts(loader: Any, limit: int | None) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []
    for batch in loader:
        rows += zip(batch["text"], batch["y"].tolist(), strict=True)
        if limit is not None and len(rows) >= limit:
            break
    return rows[:limit]


def _sorted_batches(texts: list[str], size: int = 64) -> list[list[str]]:
    texts = sorted(texts, key=len)
    return [texts[start : start + size] for start in range(0, len(texts), size)]


create_bench = cache(Bench)


def run(config: Config, seed: int, options: Options) -> Run:
    """Replace, distill, probe; or time."""
    torch.set_flush_denormal(True)
    bench = create_bench(options)
    if config["measure"] == "time":
        return times(bench, config["layers"], options.quick)
    torch.manual_seed(seed)
    if config["layer"] == "original":
        return {"error": [0.0], "acc": bench.accuracy()}
    blocks: Any = "all" if config["blocks"] == "all" else [len(replaceable(bench.model)) // 2]
    with replace_feedforward(bench.model, creator(config), blocks) as replacement:
        layers = list(replacement.layers.values())
        distilled = distill_feedforward(
            replacement,
            bench.batches,
            steps=20 if options.quick else STEPS,
            lr=LR,
            batch_tokens=BATCH_TOKENS,
            sequential=config.get("sequential", True),
            seed=seed,
        )
        return {
            "parameters": sum(p.numel() for p in layers[0].parameters()),
            "start": [round(block.start, 5) for block in distilled],
            "error": [round(block.error, 5) for block in distilled],
            "acc": bench.accuracy(),
        }


def replaceable(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of every MLP of the model."""
    with replace_feedforward(model, lambda dim: nn.Linear(dim, dim)) as replacement:
        return list(replacement.originals().values())


@torch.no_grad()
def times(bench: Bench, configs: dict[str, Config], quick: bool) -> Run:
    """Milliseconds of a call of one MLP and of what replaces it, side by side, on one thread."""
    original = nn.Sequential(*replaceable(bench.model)[0]).eval()
    dim = next(original.parameters()).shape[1]
    tokens = torch.randn(*((2, 8) if quick else TIMED), dim)
    layers: dict[str, nn.Module] = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        layers[name] = original if config["layer"] == "original" else creator(config)(dim).eval()
        if isinstance(layer := layers[name], DDCLFeedForward):
            layer.start_from(tokens.flatten(0, 1))
    fastest = dict.fromkeys(layers, float("inf"))
    for turn in range(2 if quick else 61):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(tokens)
            if turn:
                fastest[name] = min(fastest[name], 1e3 * (time.perf_counter() - start))
    parameters = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    return {"fastest_ms": fastest, "parameters": parameters}


def all_errors(runs: list[Run]) -> str:
    """From the lowest error of a block to the highest, over all seeds."""
    errors = [{"error": error} for run in runs for error in run["error"]]
    return interval("error", ".3f")(errors) if any(error["error"] for error in errors) else "0" if errors else ""


def table(results: Results) -> Table:
    """Size and time of every replacement, and what it does in one block and in all."""
    timed = results.of("time")
    rows = [["in its place", "parameters", "time", "one block: error", "accuracy", "all blocks: error", "accuracy"]]
    for name, (label, size, *_) in METHODS.items():
        ratio = mean(lambda run, name=name: run["fastest_ms"][name] / run["fastest_ms"][MLP], ".2f")(timed)
        single, every = (results.of(f"{blocks}/{name}") for blocks in ("one", "all"))
        error = mean(lambda run: run["error"][0])(single) if name != MLP else "0"
        rows.append([label, size, ratio, error, mean("acc")(single), all_errors(every), mean("acc")(every)])
    return rows


STUDY = Study(
    "feedforward",
    CASES,
    run,
    {"replacements": table},
    settings={
        "phrases": PHRASES,
        "probe": PROBE,
        "steps": STEPS,
        "lr": LR,
        "batch_tokens": BATCH_TOKENS,
        "timed": TIMED,
    },
    packages=("transformers",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
