"""Mean, covariance and relative error of tokens, over all processes, in two passes."""

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import sum_over_processes
from ddcl_lightning.functional._common import accumulation_dtype, zero_padding


def joint_mean(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of the valid tokens of all processes, and their number.

    Args:
        tokens: ``(..., N, d)``.
        mask: ``(..., N)`` boolean, True for valid tokens, or None.

    Returns:
        Mean ``(..., d)``, zero without a token, and number ``(..., 1)``, in float32 or wider.
    """
    z = zero_padding(tokens.to(accumulation_dtype(tokens)), mask)
    valid = torch.ones_like(z[..., :1]) if mask is None else mask.unsqueeze(-1).to(z.dtype)
    sums = sum_over_processes(torch.cat([z.sum(-2), valid.sum(-2)], -1))
    number = sums[..., -1:]
    return sums[..., :-1] / number.clamp(min=1.0), number


def joint_covariance(
    tokens: Tensor, mask: Tensor | None, mean: Tensor, number: Tensor, *, diagonal: bool = False
) -> Tensor:
    """Covariance ``(..., d, d)`` of the valid tokens of all processes, or the variances ``(..., d)`` alone.

    Args:
        tokens: ``(..., N, d)``.
        mask: ``(..., N)`` boolean, True for valid tokens, or None.
        mean: ``(..., d)``, as :func:`joint_mean` returns it.
        number: ``(..., 1)``, as :func:`joint_mean` returns it.
        diagonal: Return the variances.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        centred = zero_padding(tokens.to(mean.dtype) - mean.unsqueeze(-2), mask)
        total = centred.square().sum(-2) if diagonal else centred.mT @ centred
    number = number.clamp(min=1.0)
    return sum_over_processes(total) / (number if diagonal else number.unsqueeze(-1))


def joint_spread(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squared distances ``()`` of the valid ones of tokens ``(N, d)`` of all processes from their mean."""
    mean, number = joint_mean(tokens, mask)
    return joint_covariance(tokens, mask, mean, number, diagonal=True).sum() * number.sum()


@torch.no_grad()
def relative_error(
    residual: Tensor, tokens: Tensor, mask: Tensor | None, *, joint: bool, unbiased: bool = False
) -> Tensor:
    """Mean square ``()`` of residuals as a share of the variance of the tokens; valid ones of both ``(*, d)`` count.

    Args:
        residual: What codes leave of the tokens.
        tokens: Their shape is that of the residual.
        mask: ``(*)`` boolean, True for valid tokens, or None.
        joint: Count the tokens of all processes, not only those of this one.
        unbiased: Take the unbiased variance: few tokens are close to their own mean.
    """
    reduce = sum_over_processes if joint else _of_this_process
    rows = None if mask is None else mask.flatten()
    z = zero_padding(tokens.detach().flatten(0, -2).to(accumulation_dtype(tokens)), rows)
    rest = zero_padding(residual.detach().flatten(0, -2).to(z.dtype), rows).square().sum()
    valid = torch.ones_like(z[:, 0]) if rows is None else rows.to(z.dtype)
    number, rest, *total = reduce(torch.cat([valid.sum().reshape(1), rest.reshape(1), z.sum(0)])).unbind()
    mean = torch.stack(total) / number.clamp(min=1.0)
    spread = reduce(zero_padding(z - mean, rows).square().sum())
    if unbiased:
        spread = spread * number / (number - 1).clamp(min=1.0)
    return rest / spread.clamp(min=torch.finfo(spread.dtype).tiny)


def _of_this_process(values: Tensor) -> Tensor:
    return values
