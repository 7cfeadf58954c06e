"""The ratio of the rates in modules with optimizers of their own."""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.nn.discovery import prototypes_of, require_banks
from ddcl_lightning.optim.two_timescale import live_ratio, parameter_ids
from ddcl_lightning.tasks.readout_module import ReadoutModule


class RatioGuard(Callback):
    """Callback that logs the ratio of the encoder's rate to that of the prototypes, and tells where it is large.

    The ratio rho sets how fast an encoder that trains on the quantization loss alone shrinks or merges its embeddings.
    It does not decide whether: local stability is the same for every rho > 0, and Theorem 1 of the paper has no bound
    to check (``docs/stability.md``). What prevents a collapse is a bound on the scale of the embeddings, or a loss of
    the encoder's own; with these a rho of 1, that of a plain optimizer, may serve well.

    For modules with one optimizer whose parameter groups separate prototypes from the rest
    (:func:`~ddcl_lightning.two_timescale_groups` makes them), or with two optimizers. Every trainable parameter that is
    no prototype counts as encoder unless ``ignore`` names it. A :class:`~ddcl_lightning.DDCLReadoutModule` refuses
    rho >= 1 itself, and gives this callback the parameters of its encoder.

    Args:
        max_ratio: In (0, 1]; a ``rho = lr_encoder / lr_prototypes`` of this or more is reported.
        ignore: Prefixes of parameter names that are neither encoder nor prototypes (a classifier, say).
        on_violation: ``"warn"``, once per run, or ``"raise"``.

    Raises:
        ValueError: If an argument is out of its range or the module holds no bank.
        RuntimeError: Where rho is too large, with ``on_violation="raise"``.
    """

    @typed
    def __init__(
        self,
        max_ratio: float = 1.0,
        ignore: tuple[str, ...] | list[str] = (),
        on_violation: Literal["raise", "warn"] = "warn",
    ) -> None:
        if not 0 < max_ratio <= 1:
            raise ValueError(f"max_ratio must be in (0, 1]; got {max_ratio}. Its default is 1.0.")
        if on_violation not in ("raise", "warn"):
            raise ValueError(f"on_violation must be 'raise' or 'warn'; got {on_violation!r}. Choose one of them.")
        self.max_ratio, self.ignore, self.on_violation = max_ratio, tuple(ignore), on_violation
        self._warned = False
        self._fast: set[int] = set()
        self._slow: list[nn.Parameter] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sort the parameters into those of prototypes and of the encoder."""
        self._warned = False
        self._fast = parameter_ids(prototypes_of(require_banks(pl_module, "RatioGuard").values()))
        if isinstance(pl_module, ReadoutModule):
            self._slow = pl_module.parameter_groups()["encoder"]
            return
        self._slow = [
            parameter
            for name, parameter in pl_module.named_parameters()
            if id(parameter) not in self._fast and not name.startswith(self.ignore)
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the learning rates that the step of this batch will use."""
        # Encoders may be unfrozen during training.
        slow = parameter_ids(parameter for parameter in self._slow if parameter.requires_grad)
        ratio = live_ratio(trainer.optimizers, self._fast, slow)
        if ratio is None:
            return
        pl_module.log("rho", ratio)
        if ratio >= self.max_ratio:
            self._report(trainer, ratio)

    def _report(self, trainer: pl.Trainer, ratio: float) -> None:
        message = (
            f"rho = lr_encoder / lr_prototypes is {ratio:.3g} at step {trainer.global_step}, not below max_ratio = "
            f"{self.max_ratio:g}. The larger rho is, the faster an encoder that trains on the quantization loss alone "
            "collapses; no rho prevents that, but a bound on the scale of its embeddings (embedding_scale='whiten') or "
            "a loss of its own does. For slower encoders: "
            "torch.optim.Adam(two_timescale_groups(self, lr_prototypes=1e-2, rho=0.1))."
        )
        if self.on_violation == "raise":
            raise RuntimeError(message)
        if not self._warned:
            self._warned = True
            rank_zero_warn(message)
