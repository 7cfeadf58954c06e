"""Two levels of prototypes on 20 Newsgroups (section 7.5, Table 6): the paper's setting, ours, and k-means.

Level 1 reads the tokens of a frozen encoder through 64 prototypes, level 2 one vector per post through 20. The paper
gives both levels one temperature, whose value its text lost; the centroids' means spread less than the tokens, so
that what is a good temperature for level 1 is above the critical one of level 2. Here it is run held at such a
value, and annealed through it, beside ours: a fraction of each level's own critical temperature, tokens at unit length,
and the mean weighted by the rarity of the tokens' prototypes. All start level by level from k-means.

    python benchmarks/hierarchy.py --encoder FOLDER
    python benchmarks/hierarchy.py --encoder FOLDER --posts test    # which nothing here was chosen by
    python benchmarks/hierarchy.py --quick          # digits: strokes and digits, no encoder

FOLDER is a Hugging Face encoder; the texts are read from ``--data`` (20newsgroups_bydate_stripped.jsonl.gz). Writes
``hierarchy.json`` after every run (with ``_test``, ``_dD`` for other posts and dimensions), and continues where an
interrupted one ended.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import ROOT, load, options, plus_minus, quiet_trainer, save
from text_readouts import TASKS, data_module
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.utils.data import DataLoader

from ddcl_lightning import Clustering, DDCLReadoutModule, Decomposition, IdentityBackbone, Temperature, find_banks
from ddcl_lightning._utils.batch import labels
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.backbones import PatchBackbone, TransformersBackbone
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.callbacks._base import BankCallback
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.functional import critical_temperature, decompose
from ddcl_lightning.heads import HierarchicalReadout
from ddcl_lightning.heads.pooling import mean_token
from ddcl_lightning.metrics.probing import clustering_scores, collect_readouts, kmeans_scores
from ddcl_lightning.monitoring.recording import CodebookRecord
from ddcl_lightning.monitoring.signals import read_signals

SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 3
# Of the tokens, unless told otherwise: their first singular directions, not centred, so that lengths and angles stay.
DIM = 128
SIZES = [64, 20]  # the paper's
HELD, LAST = 0.5, 0.02  # the paper's one temperature, as fractions of level 1's critical one; its values are lost
LEVEL_1, LEVEL_2 = (0.1, 0.02), (0.1, 0.005)  # ours, of each level's own
VIEWS = ("k-means, CLS", "k-means, mean", "k-means, mean, unit length")
METHODS = (
    "ours, rare mean of tokens",
    "ours, rare mean of centroids",
    "ours, mean of centroids",
    "ours, mean of centroids, fast",  # at the paper's rate: what unit length alone brings
    "paper, one T annealed",
    "paper, one T held",
    "paper, T of each level",  # the paper's but for the temperature, which alone is ours
)


class SmallestSpread(BankCallback):
    """Smallest V of every bank over all steps: as trained, and for few tokens from its definition in float64.

    At the low temperatures of level 2, float32 leaves nothing of V but rounding.
    """

    def __init__(self) -> None:
        super().__init__(every_n_batches=1)
        self.found: dict[str, float] = {}

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: dict[str, CodebookRecord]) -> None:
        """Keep what is smaller."""
        for name, one in seen.items():
            few = one.tokens.shape[1] <= 1024
            exact = decompose(one.tokens, one.prototypes, one.temperature, one.mask) if few else one.terms
            self.found[name] = min(self.found.get(name, float("inf")), float(exact.variance.min()))


class Features:
    """Tokens of all samples in memory: ``x`` ``(N, T, D)``, ``mask`` ``(N, T)``, ``y`` ``(N,)``."""

    def __init__(self, x: Tensor, mask: Tensor, y: Tensor) -> None:
        self.x, self.mask, self.y = x, mask, y

    def loader(self, shuffle: bool) -> DataLoader[Any]:
        """Batches of 256."""
        rows: Any = range(len(self.y))
        return DataLoader(rows, batch_size=256, shuffle=shuffle, collate_fn=self.batch)

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Some samples."""
        return {"x": self.x[rows].float(), "mask": self.mask[rows], "y": self.y[rows]}

    def mean(self) -> Tensor:
        """Mean valid token of every sample, ``(N, D)``."""
        parts = self.loader(shuffle=False)
        return torch.cat([mean_token(one["x"] * one["mask"].unsqueeze(-1), one["mask"]) for one in parts])

    def reduced(self, dim: int) -> "Features":
        """The same in the first right singular directions of the tokens."""
        sample = self.sample(65_536).double()
        energy, directions = torch.linalg.eigh(sample.mT @ sample)
        basis = directions[:, -dim:].flip(1).float()
        print(
            f"{float(energy[-dim:].sum() / energy.sum()):.1%} of the tokens' squared length in {dim} directions",
            flush=True,
        )
        parts = [(one["x"] @ basis).half() for one in self.loader(shuffle=False)]
        return Features(torch.cat(parts), self.mask, self.y)

    def sample(self, size: int) -> Tensor:
        """Some valid tokens, ``(size, D)``."""
        rows = torch.nonzero(self.mask)
        chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:size]]
        return self.x[chosen[:, 0], chosen[:, 1]].float()


@torch.no_grad()
def newsgroups(args: argparse.Namespace) -> Features:
    length = TASKS["newsgroups"]["max_length"]
    backbone = TransformersBackbone(str(args.encoder), max_length=length, cache_dir=str(args.cache))
    data = data_module("newsgroups", args, seed=0, evaluate_on="train" if args.posts == "train" else "auto")
    data.setup()
    posts = data.test_dataloader()
    backbone.fill_cache(posts)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in posts:
        tokens, mask = backbone(batch)
        truth = labels(batch)
        assert mask is not None
        assert truth is not None
        room = (0, length - tokens.shape[1])
        parts.append((pad(tokens, (0, 0, *room)).half(), pad(mask, room), truth))
    features = Features(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return features if args.dim == features.x.shape[-1] else features.reduced(args.dim)


@torch.no_grad()
def digits() -> Features:
    """The quick version: patches of the digits as tokens."""
    data = DigitsDataModule(limit=400, seed=0, as_images=True)
    data.setup()
    batches = list(data.val_dataloader())
    x = torch.cat([PatchBackbone(patch_size=4, stride=2)(batch).values for batch in batches])
    truth = torch.cat([batch["y"] for batch in batches])
    return Features(x, torch.ones(x.shape[:2], dtype=torch.bool), truth)


def head_and_schedules(method: str, sizes: list[int], critical: float) -> tuple[HierarchicalReadout, list[Any]]:
    """A head, and what sets its temperatures; ``critical`` is that of the tokens as they are."""
    own = [
        TemperatureAnnealing(*LEVEL_1, per="step", banks="*levels.0.*"),
        TemperatureAnnealing(*LEVEL_2, per="step", banks="*levels.1.*"),
    ]
    if method.endswith("each level"):
        return HierarchicalReadout(sizes, temperature_unit=["absolute", "critical"]), own
    if method.startswith("paper"):
        last = HELD if method.endswith("held") else LAST
        annealing = TemperatureAnnealing(start=HELD * critical, end=last * critical, unit="absolute", per="step")
        return HierarchicalReadout(sizes, temperature=Temperature(HELD * critical, unit="absolute")), [annealing]
    above = "rare_inputs" if method.endswith("tokens") else "rare_mean" if "rare" in method else "mean"
    reads: Any = ["all", above]
    # A frozen encoder's tokens do not move: their critical temperature is measured once. Those of level 2 do.
    head = HierarchicalReadout(sizes, tokens=reads, embedding_scale="unit", temperature_unit=["absolute", "critical"])
    return head, own


def train(features: Features, method: str, sizes: list[int], critical: float, seed: int, epochs: int) -> dict[str, Any]:
    """Scores after the last epoch, and the state of both levels."""
    pl.seed_everything(seed, verbose=False)
    head, schedules = head_and_schedules(method, sizes, critical)
    rate = 1e-2 if method.startswith("paper") or method.endswith("fast") else 1e-3
    backbone = IdentityBackbone(features.x.shape[-1])
    module = DDCLReadoutModule(backbone, head, Clustering(sizes[-1]), lr_prototypes=rate, rho=0.0)
    spread, check = SmallestSpread(), DecompositionCheck(every_n_batches=40)
    start = KMeansInitialization(num_restarts=10, max_tokens=12_000, seed=100 * seed, progress=False)
    trainer = quiet_trainer(epochs, [*schedules, start, spread, check], limit_val_batches=0)
    begin = time.perf_counter()
    trainer.fit(module, features.loader(shuffle=True))
    seconds = time.perf_counter() - begin
    samples = {name: Reservoir(16_384) for name in find_banks(module.head)}
    found = collect_readouts(module, features.loader(shuffle=False), tokens=samples, max_samples=1 << 30)
    levels = []
    for (name, bank), sample in zip(find_banks(module.head).items(), samples.values(), strict=True):
        terms = Decomposition(*(torch.zeros(1) for _ in range(3)))  # not read
        tokens = sample.gather().transpose(0, 1)
        seen = CodebookRecord(tokens, None, bank.prototypes.detach(), bank.temperature, terms)
        now = read_signals(seen, bank.detach_assignments)[0]
        levels.append(
            {
                "temperature_ratio": now.temperature_ratio,
                "critical": now.critical,
                "entropy_ratio": now.entropy_ratio,
                "delta_relative": now.relative_separation,
                "smallest_variance": spread.found[f"head.{name}"],
                "scale": now.scale,
            }
        )
    return {
        "method": method,
        "seed": seed,
        **clustering_scores(found.clusters[:, 0], found.labels, sizes[-1]),
        "levels": levels,
        "checks": check.checks,
        "violations": check.violations,
        "seconds": round(seconds, 1),
    }


def run(features: Features, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill in what is missing."""
    sizes, epochs = ([16, 10], 1) if args.quick else (SIZES, EPOCHS)
    result["rows"], runs = len(features.y), result.setdefault("runs", [])
    critical = float(critical_temperature(features.sample(16_384)))
    mean = features.mean()
    first = features.x[torch.arange(len(features.y)), features.mask.int().argmax(1)].float()
    views = dict(zip(VIEWS, (first, mean, normalize(mean)), strict=True))
    seeds = SEEDS[: 1 if args.quick else None]
    done = {(one["method"], one["seed"]) for one in runs}
    for method, seed in ((method, seed) for seed in seeds for method in args.methods):
        if (method, seed) in done:
            continue
        if method in views:
            scores = kmeans_scores(views[method], features.y, sizes[-1], num_restarts=10, seed=100 * seed)
            runs.append({"method": method, "seed": seed, **scores})
        else:
            runs.append(train(features, method, sizes, critical, seed, epochs))
        save(args.output, args.name, result)
        print(runs[-1], flush=True)


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| method | ACC | NMI | ARI | T / T_c: level 1, 2 | H / ln K: level 1, 2 | smallest V: level 1, 2 |"]
    lines.append("|---|---|---|---|---|---|---|")
    found = {one["method"] for one in result["runs"]}
    for method in sorted(found, key=lambda name: (not name.startswith("k-means"), name)):
        runs = [one for one in result["runs"] if one["method"] == method]
        cells = [plus_minus(one[key] for one in runs) for key in ("acc", "nmi", "ari")]
        for key, form, pick in (
            ("temperature_ratio", "{:.3g}", max),
            ("entropy_ratio", "{:.3f}", max),
            ("smallest_variance", "{:.2g}", min),
        ):
            both = (0, 1) if "levels" in runs[0] else ()
            cells.append(", ".join(form.format(pick(one["levels"][i][key] for one in runs)) for i in both))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything, or go on with it."""
    parser = options(__doc__)
    parser.add_argument("--encoder", type=Path, help="folder of a Hugging Face encoder; not needed with --quick")
    shared = Path(os.environ.get("DDCL_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder of the text file")
    parser.add_argument("--cache", type=Path, default=ROOT / "feature_cache", help="folder of the features")
    parser.add_argument("--posts", choices=("train", "test"), default="train", help="what is clustered, and scored")
    parser.add_argument("--dim", type=int, default=DIM, help="dimension of the tokens")
    parser.add_argument("--methods", nargs="*", choices=(*VIEWS, *METHODS), default=(*VIEWS, *METHODS))
    args = parser.parse_args()
    args.name = "hierarchy" + ("_test" if args.posts == "test" else "") + (f"_d{args.dim}" if args.dim != DIM else "")
    if args.encoder is None and not args.quick:
        parser.error("--encoder FOLDER is needed without --quick")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_flush_denormal(True)
    result = {} if args.quick else load(args.output, args.name)
    result.pop("versions", None)
    result["settings"] = {
        "sizes": SIZES,
        "epochs": EPOCHS,
        "dim": args.dim,
        "posts": args.posts,
        "paper": {"held": HELD, "last": LAST, "lr_prototypes": 1e-2},
        "ours": {"level_1": LEVEL_1, "level_2": LEVEL_2, "lr_prototypes": 1e-3},
    }
    if not args.quick:
        config = json.loads((args.encoder / "config.json").read_text(encoding="utf-8"))
        keys = ("architectures", "num_hidden_layers", "hidden_size", "vocab_size")
        result["settings"]["encoder"] = {key: config[key] for key in keys}
    run(digits() if args.quick else newsgroups(args), args, result)
    print(table(result))


if __name__ == "__main__":
    main()
