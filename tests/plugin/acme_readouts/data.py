"""A data set."""

import torch
from torch import Tensor

from ddcl_lightning import EvaluateOn, TensorDataModule, typed


class StripedDataModule(TensorDataModule):
    """Images of 8 x 8 pixels with as many bright rows as their label says, and some noise."""

    feature_names = tuple(f"pixel_{pixel}" for pixel in range(64))
    class_names = tuple(str(rows) for rows in range(5))

    @typed
    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.2,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(300) % 5
        order = torch.rand(300, 8, generator=generator).argsort(1)
        bright = (order < y.unsqueeze(1)).float().unsqueeze(-1)
        return (bright + 0.1 * torch.randn(300, 8, 8, generator=generator)).flatten(1), y
