"""Prototypes that start where the tokens are."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.seeding import resolve_seed
from ddcl_lightning.callbacks.temperature_annealing import TemperatureAnnealing
from ddcl_lightning.monitoring.token_sampling import calls_per_step, collect_tokens, execution_order
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks, require_banks
from ddcl_lightning.nn.initialization import InitMethod


class KMeansInitialization(Callback):
    """Callback that starts the prototypes of every bank from the tokens that reach it (section 7.1).

    The module's own training step runs over its own training loader, transforms, masks and all, up to the bank;
    a bounded uniform sample of the valid tokens is clustered, head by head, on the first process and sent to the
    others. Banks are done in the order in which the step calls them, so that a second level sees what the first
    one really gives; a bank that several layers share is started from the tokens of all of them. A bank that is
    initialized already (a resumed or loaded run) is left alone, and so is a frozen one (``requires_grad_(False)``),
    with a warning if nothing has set it. The pass leaves no trace: loaders, random state, modes
    and buffers stay as they were.

    Args:
        method: ``"kmeans"`` (k-means++, best of ``num_restarts``) or ``"farthest_point"``.
        num_restarts: Runs of k-means per head.
        max_tokens: Size of the sample over all processes.
        seed: Seed of sample and clustering; by default that of ``seed_everything``.
        progress: Show progress bars, where the trainer does.

    Raises:
        ValueError: If an argument is out of its range; at the start of training, if no bank is found, the loader is
            empty, or there are fewer distinct tokens than prototypes.
    """

    @typed
    def __init__(
        self,
        method: InitMethod = "kmeans",
        num_restarts: int = 10,
        max_tokens: int = 65_536,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        if method not in ("kmeans", "farthest_point"):
            raise ValueError(f"method must be 'kmeans' or 'farthest_point'; got {method!r}. Choose one of them.")
        for name, value in (("num_restarts", num_restarts), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Pass 1 or more.")
        self.method, self.num_restarts, self.max_tokens = method, num_restarts, max_tokens
        self.seed, self.progress = resolve_seed(seed), progress

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module without banks before anything runs."""
        require_banks(pl_module, type(self).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Initialize the banks that were not initialized yet."""
        banks = {name: bank for name, bank in find_banks(pl_module).items() if not self._is_frozen(name, bank)}
        if all(bool(bank.initialized) for bank in banks.values()):
            return
        progress = self.progress and trainer.progress_bar_callback is not None
        annealing = [callback for callback in trainer.callbacks if isinstance(callback, TemperatureAnnealing)]  # type: ignore[attr-defined]
        for name in execution_order(trainer, pl_module, banks):
            bank = banks[name]
            if bool(bank.initialized):
                continue
            # Of layers that share a bank, the later ones see sensible tokens once it has started from the first one's.
            for calls in sorted({1, calls_per_step(pl_module, bank)}):
                tokens = collect_tokens(
                    trainer,
                    pl_module,
                    name,
                    bank,
                    max_tokens=self.max_tokens,
                    seed=self.seed,
                    progress=progress,
                    calls=calls,
                )
                for callback in annealing:
                    # The next bank's tokens depend on this one's temperature, so it is set now.
                    callback.set_now(trainer, name, bank)
                bank.initialize(
                    tokens.transpose(0, 1).flatten(1),
                    method=self.method,
                    num_restarts=self.num_restarts,
                    seed=self.seed,
                    progress=progress,
                    name=name,
                )
            rank_zero_info(
                f"{self.method}: {bank.num_heads} x {bank.num_prototypes} prototypes of {name} set from "
                f"{tokens.shape[1]} tokens."
            )

    def _is_frozen(self, name: str, bank: PrototypeBank) -> bool:
        if bank.marker.requires_grad:
            return False
        if not bool(bank.initialized):
            rank_zero_warn(
                f"the prototypes of {name!r} are frozen and were never set from data: {type(self).__name__} leaves "
                "them as they are. Call set_prototypes, or freeze them after the start (freeze_prototypes_steps)."
            )
        return True
