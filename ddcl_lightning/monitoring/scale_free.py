"""Lengths and directions of vectors at any scale, also where their squares are beyond the dtype."""

import math

import torch
from torch import Tensor


def lengths(vectors: Tensor) -> Tensor:
    """Norms ``(...)`` of vectors ``(..., d)``, in their dtype."""
    largest = _largest(vectors)
    rescaled: Tensor = torch.linalg.vector_norm(vectors / largest, dim=-1)
    return rescaled * largest.squeeze(-1)


def directions(vectors: Tensor) -> Tensor:
    """Vectors ``(..., d)`` of norm 1; zero where they are zero."""
    rescaled = vectors / _largest(vectors)
    norms: Tensor = torch.linalg.vector_norm(rescaled, dim=-1, keepdim=True)
    return rescaled / norms.clamp(min=torch.finfo(vectors.dtype).tiny)


def power_of_two(values: Tensor) -> float:
    """Power of two next to the largest of some numbers, by which they are divided without rounding; 1 of zeros."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0


def _largest(vectors: Tensor) -> Tensor:
    if not vectors.shape[-1]:
        return vectors.new_ones(*vectors.shape[:-1], 1)
    largest = vectors.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)
