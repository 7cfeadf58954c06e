"""Random flips and crops of training images, each a function of seed, epoch and row alone.

No generator is carried from batch to batch, so the batch size, the number of workers and processes, and a restart in
the middle of an epoch change nothing.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddcl_lightning.datamodules._loading import Batch

Augmentation = Literal["none", "flip", "crop_flip"]


class RandomImages:
    """Mirrors half of the images and, if asked to, moves them by up to an eighth of their side.

    The usual augmentation of CIFAR: a crop of the original size from the image padded with 4 of 32 black pixels.

    Args:
        seed: Seed of all draws.
        crop: Crop, besides mirroring.
    """

    def __init__(self, seed: int, crop: bool) -> None:
        self.seed = seed
        self.crop = crop

    def __call__(self, batch: Batch, epochs: Tensor) -> Batch:
        """The batch with other ``x`` ``(B, C, H, W)``; ``epochs`` ``(B,)`` int64."""
        bits = random_bits(self.seed, epochs, batch["index"])
        height, width = batch["x"].shape[-2:]
        pad = min(height, width) // 8 if self.crop else 0
        # Distinct bits of one draw; 2 * pad + 1 is so far below 2 ** 20 that the remainder is uniform enough.
        top, left = (bits >> 1) % 2**20 % (2 * pad + 1), (bits >> 21) % 2**20 % (2 * pad + 1)
        return {**batch, "x": crop_and_flip(batch["x"], pad, top, left, bits % 2 == 1)}


def crop_and_flip(x: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """A window of the original size out of each padded image, mirrored where ``flip`` says so.

    Args:
        x: Images, ``(B, C, H, W)``.
        pad: Zeros on each side, at least 0.
        top: First row of each window, ``(B,)`` in [0, 2 * pad].
        left: First column, ``(B,)`` in [0, 2 * pad].
        flip: Mirror the columns, ``(B,)`` bool.

    Returns:
        ``(B, C, H, W)``.
    """
    height, width = x.shape[-2:]
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)
    return padded.gather(2, pixels[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def random_bits(seed: int, epochs: Tensor, index: Tensor) -> Tensor:
    """41 random bits for each pair of epoch and row, ``(B,)`` int64 >= 0, by three rounds of SplitMix64.

    SplitMix64 is the finalizer of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    state = np.zeros(len(index), dtype=np.uint64)
    for word in (np.full(len(index), seed), epochs.numpy(), index.numpy()):
        state = state + np.uint64(0x9E3779B97F4A7C15) + word.astype(np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(23)).astype(np.int64))
