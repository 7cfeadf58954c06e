"""Random problems for a layer of prototypes, of every scale, offset and temperature, with and without padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Problems:
    """Problems of one shape: tokens ``(B, N, d)``, prototypes ``(B, K, d)``, temperature ``(B,)``, mask ``(B, N)``."""

    tokens: Tensor
    prototypes: Tensor
    temperature: Tensor
    mask: Tensor | None


def draw(size: int, shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> Problems:
    """Random problems; every property but the shape differs within the chunk."""

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator, dtype=torch.float64)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    tokens_per, prototypes_per, dim = shape
    tokens = normal(size, tokens_per, dim) * 10 ** (uniform(size, 1, dim) * 2 - 1)  # anisotropic
    prototypes = normal(size, prototypes_per, dim)
    # Four kinds of banks: at random, at tokens (as after training), collapsed, and left behind by the encoder.
    kind = (uniform(size, 1, 1) * 4).long()
    picked = (uniform(size, prototypes_per) * tokens_per).long().unsqueeze(-1).expand(-1, -1, dim)
    at_tokens = tokens.gather(1, picked) + prototypes * 10 ** (-4 * uniform(size, 1, 1))
    collapsed = prototypes * 10 ** (-6 * uniform(size, 1, 1))
    behind = prototypes + 10 * normal(size, 1, dim)
    prototypes = torch.where(kind == 1, at_tokens, prototypes)
    prototypes = torch.where(kind == 2, collapsed, torch.where(kind == 3, behind, prototypes))
    # Half of the problems lie away from the origin, by up to 100 times the spread.
    offset = normal(size, 1, dim) * 10 ** (4 * uniform(size, 1, 1) - 2) * (uniform(size, 1, 1) < 0.5)
    scale = 10 ** (6 * uniform(size, 1, 1) - 3)
    temperature = 10 ** (8 * uniform(size) - 4)
    tokens, prototypes = (tokens + offset) * scale, (prototypes + offset) * scale
    mask = None
    if float(uniform(1)) < 0.5 and tokens_per > 1:
        mask = uniform(size, tokens_per) < 0.2 + 0.8 * uniform(size, 1)
        mask[:, 0] = True
        zero = (uniform(size, 1) < 0.5) & ~mask  # padding is zero, or what a buffer happened to hold
        tokens = tokens.masked_fill(zero.unsqueeze(-1), 0.0)
    # Under mixed precision the tokens are in half precision and the prototypes are not.
    narrow = torch.float32 if dtype == torch.bfloat16 and float(uniform(1)) < 0.5 else dtype
    temperature = temperature.to(torch.promote_types(dtype, torch.float32))
    return Problems(tokens.to(dtype), prototypes.to(narrow), temperature, mask)
