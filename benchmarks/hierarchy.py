"""Two levels of prototypes on 20 Newsgroups (section 7.5, Table 6): the paper's setting, ours, and k-means.

Level 1 reads the tokens of a frozen encoder through 64 prototypes, level 2 one vector per post through 20. The paper
gives both levels one temperature, whose value its text lost; the centroids' means spread less than the tokens, so
that what is a good temperature for level 1 is above the critical one of level 2. Here it is run held at such a
value, and annealed through it, beside ours: a fraction of each level's own critical temperature, tokens at unit length,
and the mean weighted by the idf of the tokens' prototypes. All start level by level from k-means. Nothing here was
chosen by the test posts. ``--quick`` takes digits: strokes and digits, no encoder.

    python benchmarks/hierarchy.py --encoder FOLDER --texts FOLDER [--cases 'test/128/*']
"""

from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from _measure import quiet_trainer
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, extreme, joined, mean
from text_readouts import create_backbone, data_module, encoder_settings
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.utils.data import DataLoader

from ddcl_lightning import Clustering, DDCLReadoutModule, Decomposition, IdentityBackbone, Temperature, find_banks
from ddcl_lightning._utils.batch import labels
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.backbones import PatchBackbone
from ddcl_lightning.callbacks import DecompositionCheck, KMeansInitialization, TemperatureAnnealing
from ddcl_lightning.callbacks._base import BankCallback
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.functional import critical_temperature, decompose
from ddcl_lightning.heads import HierarchicalReadout
from ddcl_lightning.heads.pooling import mean_token
from ddcl_lightning.metrics.probing import clustering_scores, collect_readouts, kmeans_scores
from ddcl_lightning.monitoring.recording import BankRecord
from ddcl_lightning.monitoring.signals import read_signals

EPOCHS, LENGTH = 3, 64  # tokens of a post
SIZES = [64, 20]  # the paper's
# The paper's one temperature, as fractions of level 1's critical one; its values are lost. Then those of each level.
HELD, ANNEALED = [0.5, 0.5], [0.5, 0.02]
OWN = [[0.1, 0.02], [0.1, 0.005]]
OURS: dict[str, Any] = {"scale": "unit", "temperature": "own", "schedule": OWN, "rate": 1e-3}
PAPER: dict[str, Any] = {"level_2": "mean", "scale": "none", "temperature": "common", "rate": 1e-2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kmeans-cls": ("k-means, CLS", {"vector": "first"}),
    "kmeans-mean": ("k-means, mean", {"vector": "mean"}),
    "kmeans-mean-unit": ("k-means, mean, unit length", {"vector": "mean, unit length"}),
    "ours-mean": ("ours, mean of centroids", {**OURS, "level_2": "mean"}),
    # At the paper's rate: what unit length alone brings.
    "ours-mean-fast": ("ours, mean of centroids, fast", {**OURS, "level_2": "mean", "rate": 1e-2}),
    "ours-idf-centroids": ("ours, idf mean of centroids", {**OURS, "level_2": "idf_mean"}),
    "ours-idf-tokens": ("ours, idf mean of tokens", {**OURS, "level_2": "idf_inputs"}),
    # The paper's but for the temperature, which alone is ours.
    "paper-own": ("paper, T of each level", {**PAPER, "temperature": "own", "schedule": OWN}),
    "paper-annealed": ("paper, one T annealed", {**PAPER, "schedule": ANNEALED}),
    "paper-held": ("paper, one T held", {**PAPER, "schedule": HELD}),
}
COMPARED = ("kmeans-mean", "kmeans-mean-unit", "ours-idf-tokens")  # in all dimensions
# Posts, and the first singular directions of the tokens, not centred, so that lengths and angles stay.
TABLES: dict[tuple[str, int], tuple[str, ...]] = {
    ("train", 128): tuple(METHODS),
    ("test", 128): tuple(METHODS),
    ("train", 384): COMPARED,
    ("test", 384): COMPARED,
}


def case(name: str, posts: str, dim: int | None, sizes: list[int]) -> Case:
    label, config = METHODS[name]
    needs = () if posts == "digits" else ("encoder", "texts")
    return Case(label, {"posts": posts, "dim": dim, "sizes": sizes, **config}, needs)


CASES = {
    f"{posts}/{dim}/{name}": case(name, posts, dim, SIZES) for (posts, dim), names in TABLES.items() for name in names
}
QUICK = {f"digits/{name}": case(name, "digits", None, [16, 10]) for name in METHODS}


class SmallestSpread(BankCallback):
    """Smallest V of every bank over all steps: as trained, and for few tokens from its definition in float64.

    At the low temperatures of level 2, float32 leaves nothing of V but rounding.
    """

    def __init__(self) -> None:
        super().__init__(every_n_batches=1)
        self.smallest: dict[str, float] = {}

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, records: dict[str, BankRecord]) -> None:
        """Keep what is smaller."""
        for name, bank in records.items():
            few = bank.tokens.shape[1] <= 1024
            exact = decompose(bank.tokens, bank.codebook, bank.temperature, bank.mask) if few else bank.terms
            self.smallest[name] = min(self.smallest.get(name, float("inf")), float(exact.variance.min()))


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
        batches = self.loader(shuffle=False)
        return torch.cat([mean_token(batch["x"] * batch["mask"].unsqueeze(-1), batch["mask"]) for batch in batches])

    def reduced(self, dim: int) -> "Features":
        """Tokens in their first right singular directions."""
        sample = self.sample(65_536).double()
        basis = torch.linalg.eigh(sample.mT @ sample).eigenvectors[:, -dim:].flip(1).float()
        reduced = [(batch["x"] @ basis).half() for batch in self.loader(shuffle=False)]
        return Features(torch.cat(reduced), self.mask, self.y)

    def sample(self, size: int) -> Tensor:
        """Some valid tokens, ``(size, D)``."""
        rows = torch.nonzero(self.mask)
        chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:size]]
        return self.x[chosen[:, 0], chosen[:, 1]].float()


@cache
@torch.no_grad()
def load(posts: str, dim: int | None, options: Options) -> Features:
    """Posts, or patches of the digits as tokens."""
    if posts == "digits":
        data = DigitsDataModule(limit=400, seed=0, as_images=True)
        data.setup()
        batches = list(data.val_dataloader())
        x = torch.cat([PatchBackbone(patch_size=4, stride=2)(batch).values for batch in batches])
        return Features(x, torch.ones(x.shape[:2], dtype=torch.bool), torch.cat([batch["y"] for batch in batches]))
    backbone = create_backbone({"max_length": LENGTH}, options)
    data = data_module("newsgroups", options, 0, evaluate_on="train" if posts == "train" else "auto")
    loader = data.test_dataloader()
    backbone.fill_cache(loader)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader:
        tokens, mask = backbone(batch)
        truth = labels(batch)
        assert mask is not None
        assert truth is not None
        room = (0, LENGTH - tokens.shape[1])
        rows.append((pad(tokens, (0, 0, *room)).half(), pad(mask, room), truth))
    features = Features(*(torch.cat(column) for column in zip(*rows, strict=True)))
    return features if dim == features.x.shape[-1] else features.reduced(dim)


def create_head(config: Config, critical: float) -> tuple[HierarchicalReadout, list[Any]]:
    """A head, and what sets its temperatures; ``critical`` is that of the tokens as they are."""
    reads: Any = ["all", config["level_2"]]
    common: dict[str, Any] = {"tokens": reads, "embedding_scale": config["scale"]}
    if config["temperature"] == "own":
        schedules = [
            TemperatureAnnealing(*ends, interval="step", banks=f"*levels.{level}.*")
            for level, ends in enumerate(config["schedule"])
        ]
        return HierarchicalReadout(config["sizes"], **common), schedules
    start, end = (Temperature(fraction * critical, unit="absolute") for fraction in config["schedule"])
    readout = HierarchicalReadout(config["sizes"], temperature=start, **common)
    return readout, [TemperatureAnnealing(start=start, end=end, interval="step")]


def run(config: Config, seed: int, options: Options) -> Run:
    """Scores after the last epoch, and the state of both levels."""
    torch.set_flush_denormal(True)
    features, clusters = load(config["posts"], config["dim"], options), config["sizes"][-1]
    if "vector" in config:
        rows = features.mean()
        if config["vector"] == "first":
            rows = features.x[torch.arange(len(features.y)), features.mask.int().argmax(1)].float()
        elif config["vector"] == "mean, unit length":
            rows = normalize(rows)
        return kmeans_scores(rows, features.y, clusters, num_restarts=10, seed=100 * seed)
    pl.seed_everything(seed, verbose=False)
    head, schedules = create_head(config, float(critical_temperature(features.sample(16_384))))
    backbone = IdentityBackbone(features.x.shape[-1])
    module = DDCLReadoutModule(backbone, head, Clustering(clusters), lr_prototypes=config["rate"], rho=0.0)
    spread, check = SmallestSpread(), DecompositionCheck(every_n_batches=40)
    start = KMeansInitialization(num_restarts=10, max_tokens=12_000, seed=100 * seed, progress=False)
    trainer = quiet_trainer(1 if options.quick else EPOCHS, [*schedules, start, spread, check], limit_val_batches=0)
    trainer.fit(module, features.loader(shuffle=True))
    samples = {name: Reservoir(16_384) for name in find_banks(module.head)}
    readouts = collect_readouts(module, features.loader(shuffle=False), tokens=samples, max_samples=1 << 30)
    levels = []
    for (name, bank), sample in zip(find_banks(module.head).items(), samples.values(), strict=True):
        terms = Decomposition(*(torch.zeros(1) for _ in range(3)))  # not read
        tokens = sample.gather().transpose(0, 1)
        observation = BankRecord(tokens, None, bank.prototypes.detach(), bank.temperature, terms)
        signals = read_signals(observation)[0]
        levels.append(
            {
                "temperature_ratio": signals.temperature_ratio,
                "critical": signals.critical,
                "entropy_ratio": signals.entropy_ratio,
                "delta_relative": signals.relative_separation,
                "smallest_variance": spread.smallest[f"head.{name}"],
                "scale": signals.scale,
            }
        )
    scores = clustering_scores(readouts.clusters[:, 0], readouts.labels, clusters)
    return {**scores, "levels": levels, "checks": check.checks, "violations": check.violations}


def both_levels(pick: Any, key: str, form: str) -> Any:
    """A value of level 1 and of level 2."""

    def level(number: int) -> Any:
        return extreme(pick, lambda run: run["levels"][number][key] if "levels" in run else None, form)

    return joined(level(0), level(1))


COLUMNS = {
    "ACC": mean("acc"),
    "NMI": mean("nmi"),
    "ARI": mean("ari"),
    "T / T_c: level 1, 2": both_levels(max, "temperature_ratio", ".3g"),
    "H / ln K: level 1, 2": both_levels(max, "entropy_ratio", ".3f"),
    "smallest V: level 1, 2": both_levels(min, "smallest_variance", ".2g"),
}


def dimensions(results: Results) -> Table:
    rows = [["posts", *(METHODS[name][0] for name in COMPARED)]]
    for posts, label in (("train", "training"), ("test", "test")):
        for dim in (128, 384):
            cells = (mean("acc")(results.of(f"{posts}/{dim}/{name}")) for name in COMPARED)
            rows.append([f"{label}, {dim} dimensions", *cells])
    return rows


STUDY = Study(
    "hierarchy",
    CASES,
    run,
    {
        "train": lambda results: results.table("method", results.where(posts="train", dim=128), COLUMNS),
        "test": lambda results: results.table("method", results.where(posts="test", dim=128), COLUMNS),
        "dimensions": dimensions,
    },
    seeds=range(5),
    settings=lambda options: {
        "epochs": EPOCHS,
        "max_length": LENGTH,
        "encoder": None if options.quick else encoder_settings(options),
    },
    quick=QUICK,
    packages=("transformers",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
