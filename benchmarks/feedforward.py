"""Prototypes in the place of the MLPs of a real text encoder: error, accuracy, parameters and time.

The MLPs of one block or of all are replaced and distilled on SST-2 phrases, without labels; then logistic regression is
trained on the mean token of other phrases and tested on the validation sentences. Beside DDCLFeedForward, at the same
parameters and by the same distillation: a narrower MLP, and a single linear layer, which needs fewer. Each starts from
least squares as well as it can (the narrow MLP from a random first layer).

    python benchmarks/feedforward.py --encoder FOLDER           # 20 minutes of one free core
    python benchmarks/feedforward.py --encoder FOLDER --quick

FOLDER is a Hugging Face encoder of BERT's kind; the texts are read from ``--data`` (sst2_glue.jsonl.gz). Writes
``feedforward.json`` after every run, and continues where an interrupted one ended.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, load, options, plus_minus, save
from torch import Tensor, nn
from torch.nn.functional import gelu

from ddcl_lightning.adapters.distillation import distill_feedforward
from ddcl_lightning.adapters.feedforward import DDCLFeedForward, ridge_regression
from ddcl_lightning.adapters.replacement import replace_feedforward
from ddcl_lightning.backbones import TransformersBackbone
from ddcl_lightning.datamodules import SST2DataModule
from ddcl_lightning.metrics.probing import linear_probe

SEEDS = (0, 1, 2)
PHRASES, PROBE, STEPS, BATCH_TOKENS = 3000, 4000, 500, 256
LR = 1e-2  # the best of 3e-3, 1e-2 and 2e-2 for prototypes and the narrow MLP alike
TIMED = (32, 64)  # samples and tokens of the timed call
# Share of the MLP's parameters: heads of 16 prototypes of dimension 8, width of the narrow MLP; both per D.
SIZES = {"1/4": (1 / 16, 1.0), "1/2": (3 / 16, 2.0), "1": (7 / 16, 4.0)}
ONE, ALL = "one block", "all blocks"
# Method, size, seeds with one block, seeds with all.
PLAN = (
    ("prototypes", "1/4", 3, 3),
    ("narrow MLP", "1/4", 3, 3),
    ("linear", "1/8", 1, 1),
    ("prototypes", "1/2", 1, 0),
    ("narrow MLP", "1/2", 1, 0),
    ("prototypes", "1", 1, 0),
    ("narrow MLP", "1", 1, 0),
    ("prototypes, no linear path", "1/4", 1, 0),
    ("prototypes, tokens of the original model", "1/4", 0, 1),
)


class NarrowMLP(nn.Module):
    """The rival of the same size."""

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


def creator(method: str, size: str) -> Callable[[int], nn.Module]:
    """What makes a layer for D."""
    if method == "linear":
        return lambda dim: Linear(dim, dim)
    heads, width = SIZES[size]
    if method == "narrow MLP":
        return lambda dim: NarrowMLP(dim, int(width * dim))
    if method != "prototypes, no linear path":
        return lambda dim: DDCLFeedForward(dim, num_heads=max(1, int(heads * dim)))
    # What the linear path has cost goes into heads.
    return lambda dim: DDCLFeedForward(dim, num_heads=max(1, int((heads + 1 / 16) * dim)), linear=False)


class Bench:
    """One encoder and its texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        phrases, probe, evaluated = (40, 60, 20) if args.quick else (PHRASES, PROBE, None)
        self.backbone = TransformersBackbone(str(args.encoder), tokens="mean", max_length=64)
        self.model: nn.Module = self.backbone.encoder
        data = SST2DataModule(path=str(args.data / "sst2_glue.jsonl.gz"), batch_size=64)
        data.setup()
        train = _texts(data.train_dataloader(), phrases + probe)
        self.test = _texts(data.val_dataloader(), evaluated)
        self.distilled, self.probed = train[:phrases], train[phrases:]
        self.batches = [
            dict(zip(("input_ids", "attention_mask"), self.backbone._tokenize(part), strict=True))
            for part in _sorted_batches([text for text, _ in self.distilled])
        ]

    def accuracy(self) -> float:
        """Of logistic regression on the mean token."""
        (x, y), (test_x, test_y) = self._features(self.probed), self._features(self.test)
        return linear_probe(x, y, test_x, test_y).acc

    @torch.no_grad()
    def _features(self, rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        rows = sorted(rows, key=lambda row: len(row[0]))
        texts = [text for text, _ in rows]
        found = [self.backbone.encode(part).values[:, 0] for part in _sorted_batches(texts)]
        return torch.cat(found), torch.tensor([label for _, label in rows])


def _texts(loader: Any, limit: int | None) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for batch in loader:
        found += zip(batch["text"], batch["y"].tolist(), strict=True)
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def _sorted_batches(texts: list[str], size: int = 64) -> list[list[str]]:
    texts = sorted(texts, key=len)
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def run(bench: Bench, method: str, size: str, where: str, seed: int, quick: bool) -> dict[str, Any]:
    """Replace, distill, probe."""
    torch.manual_seed(seed)
    depth = len(replaceable(bench.model))
    blocks: Any = "all" if where == ALL else [depth // 2]
    with replace_feedforward(bench.model, creator(method, size), blocks) as replacement:
        parts = list(replacement.parts.values())
        start = time.perf_counter()
        found = distill_feedforward(
            replacement,
            bench.batches,
            steps=20 if quick else STEPS,
            lr=LR,
            batch_tokens=BATCH_TOKENS,
            sequential="original" not in method,
            seed=seed,
        )
        seconds = time.perf_counter() - start
        accuracy = bench.accuracy()
    return {
        "method": method,
        "size": size,
        "where": where,
        "seed": seed,
        "parameters": sum(p.numel() for p in parts[0].parameters()),
        "start": [round(one.start, 5) for one in found],
        "error": [round(one.error, 5) for one in found],
        "acc": accuracy,
        "seconds": round(seconds, 1),
    }


def replaceable(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of every MLP of the model."""
    with replace_feedforward(model, lambda dim: nn.Linear(dim, dim)) as replacement:
        return list(replacement.originals().values())


@torch.no_grad()
def times(bench: Bench, quick: bool) -> list[dict[str, Any]]:
    """Milliseconds of a call of one MLP and of what replaces it, side by side, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    original = nn.Sequential(*replaceable(bench.model)[0]).eval()
    dim = next(original.parameters()).shape[1]
    tokens = torch.randn(*((2, 8) if quick else TIMED), dim)
    cases: dict[tuple[str, str], nn.Module] = {("the MLP itself", "1"): original}
    for method, size, *_ in PLAN:
        torch.manual_seed(0)
        part = creator(method, size)(dim).eval()
        if isinstance(part, DDCLFeedForward):
            part.start_from(tokens.flatten(0, 1))
        cases[method, size] = part
    seen: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for turn in range(2 if quick else 61):
        for case, part in cases.items():
            start = time.perf_counter()
            part(tokens)
            if turn:
                seen[case].append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return [
        {
            "method": method,
            "size": size,
            "parameters": sum(p.numel() for p in cases[method, size].parameters()),
            "fastest_ms": min(values),
            "ratio": min(values) / min(seen["the MLP itself", "1"]),
        }
        for (method, size), values in seen.items()
    ]


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    time_of = {(row["method"], row["size"]): row for row in result["times"]}
    lines = [
        "| in place of the MLP | parameters | share | time | one block: error | ACC | all blocks: error | ACC |",
        "|---|---|---|---|---|---|---|---|",
        f"| the MLP itself | {time_of['the MLP itself', '1']['parameters']:,} | 1 | 1.00 | 0 | {result['acc']:.3f} | 0 "
        f"| {result['acc']:.3f} |",
    ]
    whole = time_of["the MLP itself", "1"]["parameters"]
    for method, size, *_ in PLAN:
        cost = time_of[method, size]
        cells = [method, f"{cost['parameters']:,}", f"{cost['parameters'] / whole:.2f}", f"{cost['ratio']:.2f}"]
        for where in (ONE, ALL):
            runs = [r for r in result["runs"] if (r["method"], r["size"], r["where"]) == (method, size, where)]
            if not runs:
                cells += ["-", "-"]
                continue
            errors = [sum(run["error"]) / len(run["error"]) for run in runs]
            several = len(runs) > 1
            cells.append(plus_minus(errors) if several else f"{errors[0]:.3f}")
            cells.append(plus_minus(run["acc"] for run in runs) if several else f"{runs[0]['acc']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = options(__doc__)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a Hugging Face encoder")
    shared = Path(os.environ.get("DDCL_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder of the text file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    bench = Bench(args)
    result = {} if args.quick else load(args.output, "feedforward")
    result.pop("versions", None)
    config: Any = bench.model.config
    result["settings"] = {
        "encoder": {name: getattr(config, name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")},
        "phrases": len(bench.distilled),
        "probe": [len(bench.probed), len(bench.test)],
        "steps": STEPS,
        "lr": LR,
        "batch_tokens": BATCH_TOKENS,
        "timed": TIMED,
    }
    if "acc" not in result:
        result["acc"] = bench.accuracy()
    if "times" not in result:
        result["times"] = times(bench, args.quick)
    runs = result.setdefault("runs", [])
    for method, size, one, every in PLAN:
        for where, seeds in ((ONE, one), (ALL, every)):
            for seed in SEEDS[: min(seeds, 1) if args.quick else seeds]:
                key = {"method": method, "size": size, "where": where, "seed": seed}
                if any(all(run[name] == value for name, value in key.items()) for run in runs):
                    continue
                runs.append(run(bench, method, size, where, seed, args.quick))
                save(args.output, "feedforward", result)
                print(runs[-1], flush=True)
    save(args.output, "feedforward", result)
    print(table(result))


if __name__ == "__main__":
    main()
