"""Names of version 0.1 that are refused with the one to use now."""

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_RULES = "rules=SizeRules({}=...)"
_TEMPERATURE = "temperature=Temperature(value, unit=...)"
# Arguments; one that is still an argument of its class is never looked up.
ARGUMENTS = {
    "budget": "max_parameters",
    "relocate": "relocation_threshold",
    "balance": "load_exponent",
    "every": "frequency",
    "per": "interval",
    "merge": _RULES.format("merge_distance"),
    "prune": _RULES.format("prune_fraction"),
    "margin": _RULES.format("split_margin"),
    "significance": _RULES.format("significance"),
    "patience": _RULES.format("patience"),
    "min_prototypes": _RULES.format("min_prototypes"),
    "max_prototypes": _RULES.format("max_prototypes"),
    "prototype_optimizer_args": "prototype_optimizer=OptimizerConfig(name, args)",
    "encoder_optimizer_args": "encoder_optimizer=OptimizerConfig(name, args)",
    "warmup_steps": "lr_schedule=LRSchedule(shape, warmup_steps)",
    "temperature_unit": _TEMPERATURE,
    "unit": "start=Temperature(value, unit=...), which every temperature may say by itself",
}
MODULES = {
    "attention": "nn.attention",
    "bank": "nn.bank",
    "codebook_metrics": "metrics.codebook_metrics",
    "collect": "monitoring.token_sampling",
    "critical": "nn.running_covariance",
    "distributed": "_utils.distributed",
    "estimator": "integrations.scikit_learn",
    "evaluation": "metrics.probing",
    "feedforward": "adapters.feedforward",
    "figures": "monitoring.plots",
    "kmeans": "nn.initialization",
    "placement": "adapters",
    "probe": "monitoring.recording",
    "quantizer": "nn.quantizer",
    "rates": "optim.two_timescale",
    "reconstruction_metrics": "metrics.reconstruction_metrics",
    "replacement": "adapters.replacement",
    "scale": "nn.scaling",
    "signals": "monitoring.signals",
}
VALUES = {"rare_mean": "idf_mean", "rare_inputs": "idf_inputs"}


def renamed_argument(owner: str, given: Iterable[str], known: Iterable[str]) -> str | None:
    """A sentence about the first argument that has another name now, or None.

    Args:
        owner: Whose arguments.
        given: Names that were given.
        known: Names that there are.
    """
    for name in given:
        if name in ARGUMENTS and name not in known:
            return f"{owner} has no argument {name!r} since version 0.2. Use {ARGUMENTS[name]}"
    return None


class _OldModules(MetaPathFinder):
    """Asked last for a module that nobody has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, or an error that says where the module is."""
        package, _, name = fullname.partition(".")
        if package == "ddcl_lightning" and name in MODULES:
            now = f"ddcl_lightning.{MODULES[name]}"
            raise ModuleNotFoundError(f"there is no {fullname} since version 0.2: it is {now} now.", name=fullname)
        return None


sys.meta_path.append(_OldModules())
