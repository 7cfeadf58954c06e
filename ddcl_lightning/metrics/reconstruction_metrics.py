"""How well images or vectors come back, over a whole data set."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional._common import zero_padding

SSIM_WINDOW = 11  # pixels; side of the Gaussian window with sigma 1.5


def peak_signal_to_noise(mse: Tensor, data_range: float = 1.0) -> Tensor:
    """PSNR in decibels, ``10 log10(data_range^2 / mse)``; infinite where the error is 0."""
    return 10 * (data_range**2 / mse).log10()


class ReconstructionMetrics(Metric):
    """Mean squared error, PSNR and SSIM over batches and processes.

    PSNR is that of the error of all images together, as in torchmetrics, not the mean of the images' own. SSIM is
    torchmetrics' (Wang et al. 2004), averaged over images; its window of 11 x 11 pixels has to fit into them.

    Args:
        data_range: Largest less smallest possible value of a pixel, > 0.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``data_range`` is not positive.
    """

    is_differentiable = False
    full_state_update = False
    squared_error: Tensor
    entries: Tensor
    images: Tensor
    similarity: Tensor
    compared: Tensor

    @typed
    def __init__(self, data_range: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not data_range > 0:
            raise ValueError(f"data_range must be > 0; got {data_range}. It is 1 for images in [0, 1].")
        self.data_range = data_range
        for name in ("squared_error", "similarity"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        for name in ("entries", "images", "compared"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add predictions and targets of a batch.

        Args:
            prediction: Images ``(B, C, H, W)`` or vectors ``(B, T, D)``.
            target: What should come back, of the same shape.
            mask: Of vectors, ``(B, T)``, True for valid ones.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction and target must have the same shape; got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}. Crop or pad one of them."
            )
        prediction, target = prediction.float(), target.float()
        squared = (prediction - target).square()
        if mask is not None:
            squared = zero_padding(squared, mask)
            self.entries += mask.sum() * squared.shape[-1]
        else:
            self.entries += squared.numel()
        self.squared_error += squared.sum()
        if prediction.dim() != 4:
            return
        self.images += len(prediction)
        if min(prediction.shape[-2:]) >= SSIM_WINDOW:
            similarity = structural_similarity_index_measure(
                prediction, target, reduction="none", data_range=float(self.data_range)
            )
            assert isinstance(similarity, Tensor)
            self.similarity += similarity.sum()
            self.compared += len(prediction)

    def compute(self) -> dict[str, Tensor]:
        """Metrics of all batches since the last reset, over all processes.

        Returns:
            Scalars ``mse``; ``psnr`` in decibels, NaN for vectors; ``ssim`` in [-1, 1], NaN for vectors and for
            images that are smaller than its window.

        Raises:
            RuntimeError: If nothing was seen.
        """
        if not self.entries.any():
            raise RuntimeError(
                "ReconstructionMetrics must see at least one image or vector before compute(); got none since the last "
                "reset. Call update(prediction, target) first."
            )
        mse = self.squared_error / self.entries
        psnr = peak_signal_to_noise(mse, self.data_range)
        return {
            "mse": mse,
            "psnr": psnr.masked_fill(self.images == 0, torch.nan),
            "ssim": self.similarity / self.compared,  # 0 / 0 is NaN: no image was large enough
        }
