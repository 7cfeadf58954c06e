"""Limits of the alarms of CodebookMonitor: plain loops of small autoencoders whose codebooks stay healthy or collapse.

Strips of digits go through an encoder of two layers, a quantizer and a decoder. A run is lost if its squared error on
held-out strips ends above 0.9 of their variance. The loss that the monitor is given is either that of the step, with
what the codebook adds, or that of the reconstruction alone.

    python benchmarks/alarm_limits.py
"""

import torch
from _study import Case, Options, Study
from _tables import Config, Results, Run, Table, interval
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddcl_lightning import CodebookMonitor

LOST = 0.9  # of the variance
TRAINED = 1400  # of the 1,797 digits
EMBEDDING: dict[str, object] = {"quantizer": "embedding", "steps": 400, "rate": 1e-3}
CASES = {
    "embedding-total": Case("VQGAN-style, loss of the step", {**EMBEDDING, "given": "total"}),
    "embedding": Case("VQGAN-style, reconstruction", {**EMBEDDING, "given": "reconstruction"}),
    "sign": Case(
        "VQGAN-style, codebook loss of the wrong sign",
        {**EMBEDDING, "steps": 1200, "weight": -1.0, "given": "reconstruction"},
        seeds=range(3),
    ),
    "commitment": Case(
        "VectorQuantize, commitment of weight 1,000",
        {"quantizer": "library", "steps": 1200, "rate": 1e-3, "weight": 1e3, "given": "reconstruction"},
        seeds=range(3),
    ),
    "fsq-short": Case(
        "FSQ, rate 1, 250 steps",
        {"quantizer": "fsq", "steps": 250, "rate": 1.0, "given": "reconstruction"},
        seeds=range(3),
    ),
    "fsq": Case(
        "FSQ, rate 1, 1,000 steps",
        {"quantizer": "fsq", "steps": 1000, "rate": 1.0, "given": "reconstruction"},
        seeds=range(3),
    ),
}
QUICK = {"embedding": Case(CASES["embedding"].label, {**CASES["embedding"].config, "steps": 30})}


class VectorQuantizer(nn.Module):
    """A quantizer as in VQGAN, with beta = 0.25."""

    def __init__(self, num_codes: int = 64, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize ``(*, d)``: vectors, indices and loss."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        indices = torch.cdist(rows, self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(tokens.shape)
        loss = (codes - tokens.detach()).square().mean() + 0.25 * (codes.detach() - tokens).square().mean()
        return tokens + (codes - tokens).detach(), indices, loss


def _quantizer(name: str) -> nn.Module:
    from vector_quantize_pytorch import FSQ, VectorQuantize

    if name == "fsq":
        return FSQ(levels=[8, 5, 5], dim=8)
    return VectorQuantizer() if name == "embedding" else VectorQuantize(dim=8, codebook_size=64, kmeans_init=True)


def run(config: Config, seed: int, options: Options) -> Run:
    """Train, and count what was found."""
    digits = torch.from_numpy(load_digits().data / 16).float().unflatten(1, (4, 16))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1))
    train, test = digits[order[:TRAINED]], digits[order[TRAINED:]]
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
    model = nn.ModuleDict({"encoder": encoder, "quantizer": _quantizer(config["quantizer"]), "decoder": decoder})
    optimizer = torch.optim.Adam(model.parameters(), lr=config["rate"])
    monitor = CodebookMonitor(model, on_collapse="ignore")
    for _ in range(config["steps"]):
        strips = train[torch.randint(len(train), (64,))]
        quantized, _, *extra = model["quantizer"](encoder(strips))
        reconstruction = (decoder(quantized) - strips).square().mean()
        loss = reconstruction + config.get("weight", 1.0) * sum(extra).sum() if extra else reconstruction
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.check(loss if config["given"] == "total" else reconstruction)
    monitor.close()
    model.eval()
    with torch.no_grad():
        error = (decoder(model["quantizer"](encoder(test))[0]) - test).square().mean()
    (row,) = monitor.latest.values()
    signs = {level: [find.sign for find in monitor.findings if find.level == level] for level in ("alarm", "notice")}
    return {
        "error": round(float(error / (test - train.mean((0, 1))).square().mean()), 4),
        "perplexity": round(row.perplexity / row.num_codes, 4),
        "judged": row.dead is not None,
        **signs,
    }


def table(results: Results) -> Table:
    columns = {
        "lost": lambda runs: f"{sum(not run['error'] <= LOST for run in runs)} of {len(runs)}",
        "error / variance": interval("error", ".2f"),
        "perplexity / K": interval("perplexity", ".2f"),
        "enough tokens read": lambda runs: f"{sum(run['judged'] for run in runs)} of {len(runs)}",
        "with an alarm": lambda runs: f"{sum(bool(run['alarm']) for run in runs)} of {len(runs)}",
    }
    return results.table("run", CASES, columns)


STUDY = Study(
    "alarm_limits",
    CASES,
    run,
    {"runs": table},
    seeds=range(10),
    settings={"lost": LOST},
    quick=QUICK,
    packages=("vector-quantize-pytorch",),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
