"""The runs of collapse_warning: thirteen kinds, in a half on which thresholds may be chosen and one that is held out.

Which of them collapse is not written here: the quality on held-out data says it. ``reference`` is a healthy default on
the same data, the level that a run of its kind can have.
"""

from typing import Any

from _study import Case

DIGITS: dict[str, Any] = {"model": "clustering", "data": "digits", "steps": 600, "batch": 128}
FASHION: dict[str, Any] = {"model": "autoencoder", "data": "fashion", "steps": 300, "batch": 16, "codes": 64}
CIFAR = {**FASHION, "data": "cifar"}
SMALL: dict[str, Any] = {**FASHION, "data": "digit-images", "batch": 32, "codes": 32}
CLASSES: dict[str, Any] = {
    "model": "classification",
    "data": "fashion",
    "steps": 400,
    "batch": 16,
    "rate": 3e-3,
    "pooling": "slots",
}

LEVELS = {**DIGITS, "encoder": "patches"}
RESIDUAL: dict[str, Any] = {**FASHION, "model": "plain-autoencoder", "method": "residual", "codes": 32}
EMBEDDING: dict[str, Any] = {**SMALL, "model": "plain-autoencoder", "method": "embedding"}
SWAV: dict[str, Any] = {"model": "swav", "data": "digits", "steps": 800, "batch": 128, "codes": 20}
MANY: dict[str, Any] = {**SMALL, "codes": 1024}

HOT = {"method": "soft", "temperature": (1.5, 1.5), "soft_output": True}
CODEBOOKS: dict[str, dict[str, Any]] = {
    "soft": {"method": "soft"},
    "standardized": {"method": "standardized"},
    "paper": {"method": "paper"},
    "hot": HOT,
    "fast-10": {"method": "soft", "rate": 2e-2},
    "fast-50": {"method": "soft", "rate": 1e-1},
    "ramp": {"method": "soft", "ramp": 100.0},
    "commitment-10": {"method": "soft", "commitment": 10.0},
    "commitment-1000": {"method": "soft", "commitment": 1000.0},
    "paper-far": {"method": "paper", "start": "far"},
    "paper-cold": {"method": "paper", "temperature": (1e-3, 1e-4), "start": "random"},
}

# Base configuration, the variant that is the reference, and what sets each variant apart.
Group = tuple[dict[str, Any], str, dict[str, dict[str, Any]]]
TUNED: dict[str, list[Group]] = {
    "clustering": [
        (
            DIGITS,
            "frozen",
            {
                "frozen": {},
                "annealed": {"temperature": (2.0, 0.005)},
                "hot": {"temperature": (1.5, 1.5)},
                "warm": {"temperature": (0.5, 0.5)},
                "sgd-100": {"optimizer": "SGD", "rate": 100.0},
                "random-far": {"start": "far"},
                "none-0.01": {"scale": "none", "rho": 0.01},
                "none-0.1": {"scale": "none", "rho": 0.1, "rate": 3e-2},
                "none-0.5": {"scale": "none", "rho": 0.5, "rate": 3e-2},
                "total-0.5": {"scale": "total", "rho": 0.5, "rate": 3e-2},
                "whiten-0.1": {"scale": "whiten", "rho": 0.1},
            },
        ),
        (
            {**DIGITS, "encoder": "mlp", "rho": 0.1},
            "mlp-whiten-0.1",
            {
                "mlp-whiten-0.1": {"scale": "whiten"},
                "mlp-whiten-0.5": {"scale": "whiten", "rho": 0.5},
                "mlp-none-0.1": {"scale": "none"},
                "mlp-none-0.001": {"scale": "none", "rho": 0.001},
            },
        ),
    ],
    "autoencoder-fashion": [(FASHION, "soft", CODEBOOKS)],
    "library": [
        (
            FASHION,
            "ema",
            {
                "ema": {"method": "ema"},
                "ema-raw": {"method": "ema-raw"},
                "ema-fast": {"method": "ema", "rate": 1e-1},
                "ema-raw-fast": {"method": "ema-raw", "rate": 2e-2},
                "ema-far": {"method": "ema-raw", "start": "far"},
                "ema-ramp": {"method": "ema", "ramp": 100.0},
                "rotation": {"method": "rotation"},
                "simvq": {"method": "simvq"},
                "simvq-fast": {"method": "simvq", "rate": 1e-1},
            },
        )
    ],
    "classification": [
        (
            CLASSES,
            "slots",
            {
                "slots": {},
                "slots-1": {"weight": 1.0},
                "slots-30": {"weight": 30.0},
                "slots-hot": {"temperature": (2.0, 2.0)},
                "slots-fast": {"rate": 1e-1},
                "slots-ramp": {"ramp": 100.0},
            },
        ),
        (
            {**CLASSES, "pooling": "histogram"},
            "histogram",
            {
                "histogram": {},
                "histogram-30": {"weight": 30.0},
                "histogram-hot": {"temperature": (2.0, 2.0)},
            },
        ),
        (
            {**CLASSES, "pooling": "centroid"},
            "centroid",
            {"centroid": {}, "centroid-hot": {"temperature": (2.0, 2.0)}},
        ),
    ],
    "tiny-batches": [
        (
            {**DIGITS, "batch": 8},
            "frozen",
            {
                "frozen": {},
                "total-0.5": {"scale": "total", "rho": 0.5, "rate": 3e-2},
                "hot": {"temperature": (1.5, 1.5)},
            },
        ),
        (
            {**SMALL, "steps": 400, "batch": 4},
            "ema",
            {"ema": {"method": "ema"}, "soft-fast": {"method": "soft", "rate": 1e-1}, "paper": {"method": "paper"}},
        ),
    ],
}
HELD_OUT: dict[str, list[Group]] = {
    "autoencoder-cifar": [(CIFAR, "soft", CODEBOOKS)],
    "residual": [
        (
            RESIDUAL,
            "good",
            {
                "good": {},
                "raw": {"arguments": {"kmeans_init": False, "threshold_ema_dead_code": 0}},
                "fast": {"rate": 1e-1},
                "ramp": {"ramp": 100.0},
                "shared": {"arguments": {"shared_codebook": True}},
                "no-commitment-fast": {"arguments": {"commitment_weight": 0.0}, "rate": 2e-2},
            },
        )
    ],
    "hierarchy": [
        (
            LEVELS,
            "good",
            {
                "good": {},
                "hot-2": {"temperatures": {"levels.1": (1.5, 1.5)}},
                "warm-2": {"temperatures": {"levels.1": (0.6, 0.6)}},
                "absolute": {"absolute": (0.02, 0.05)},
                "absolute-hot": {"absolute": (20.0, 20.0)},
                "trainable-0.5": {"rho": 0.5, "rate": 3e-2},
            },
        )
    ],
    "shift": [
        (
            {**DIGITS, "shift": "sign"},
            "frozen",
            {"frozen": {}, "whiten-0.1": {"scale": "whiten", "rho": 0.1}, "slow": {"rate": 1e-4}},
        ),
        (
            {**FASHION, "shift": "inversion"},
            "soft",
            {"soft": {"method": "soft"}, "ema": {"method": "ema"}, "ema-raw": {"method": "ema-raw"}, "hot": HOT},
        ),
    ],
    "bf16": [
        (
            {**DIGITS, "bf16": True},
            "frozen",
            {"frozen": {}, "none-0.5": {"scale": "none", "rho": 0.5, "rate": 3e-2}},
        ),
        ({**FASHION, "bf16": True}, "soft", {"soft": {"method": "soft"}, "hot": HOT}),
        ({**CLASSES, "bf16": True}, "slots", {"slots": {}, "slots-30": {"weight": 30.0}}),
    ],
    "many-codes": [
        (
            MANY,
            "soft",
            {
                "soft": {"method": "soft"},
                "ema-raw": {"method": "ema-raw"},
                "soft-fast": {"method": "soft", "rate": 1e-1},
            },
        ),
        (
            {**MANY, "batch": 8},
            "soft-b8",
            {"soft-b8": {"method": "soft"}, "paper-b8": {"method": "paper"}, "hot-b8": HOT},
        ),
    ],
    "sorted": [
        (
            {**DIGITS, "order": "sorted", "batch": 64},
            "frozen",
            {
                "frozen": {"rate": 1e-3},
                "frozen-fast": {"rate": 0.3},
                "whiten-0.1": {"scale": "whiten", "rho": 0.1},
                "none-0.5": {"scale": "none", "rho": 0.5, "rate": 3e-2},
            },
        ),
        (
            {**FASHION, "order": "sorted"},
            "soft",
            {"soft": {"method": "soft"}, "fast-50": {"method": "soft", "rate": 1e-1}},
        ),
    ],
    "swav": [
        (
            SWAV,
            "sinkhorn",
            {
                "sinkhorn": {"targets": "sinkhorn"},
                "unbalanced": {"targets": "softmax"},
                "unbalanced-fast": {"targets": "softmax", "rate": 3e-2},
                "wide-epsilon": {"targets": "sinkhorn", "epsilon": 5.0},
            },
        )
    ],
    "free": [
        (
            EMBEDDING,
            "embedding",
            {
                "embedding": {"start": "tokens"},
                "embedding-raw": {"commitment": 0.0},
                "embedding-fast": {"start": "tokens", "rate": 1e-1},
                "embedding-ramp": {"start": "tokens", "ramp": 100.0},
            },
        ),
        (
            SMALL,
            "vqvae",
            {
                "vqvae": {"method": "vqvae", "init": "kmeans"},
                "vqvae-ramp": {"method": "vqvae", "init": "kmeans", "ramp": 100.0},
                "cosine": {"method": "cosine"},
                "fsq": {"method": "fsq", "levels": (8, 5), "codes": 40},
                "fsq-fast": {"method": "fsq", "levels": (8, 5), "codes": 40, "rate": 1e-1},
            },
        ),
    ],
}


def _cases() -> dict[str, Case]:
    cases = {}
    for half, kinds in (("tuned", TUNED), ("held-out", HELD_OUT)):
        for kind, groups in kinds.items():
            for base, reference, variants in groups:
                for variant, config in variants.items():
                    place = {"half": half, "kind": kind, "variant": variant, "reference": f"{half}/{kind}/{reference}"}
                    needs = tuple({"fashion", "cifar"} & {base["data"]})
                    cases[f"{half}/{kind}/{variant}"] = Case(f"{kind} {variant}", {**place, **base, **config}, needs)
    return cases


CASES = _cases()
QUICK = {
    name: Case(CASES[name].label, {**CASES[name].config, "steps": 30})
    for name in ("tuned/clustering/frozen", "held-out/swav/sinkhorn")
}
