"""Mean, covariance and relative error of tokens, over all processes, in two passes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddcl_lightning._utils.distributed import sum_over_processes
from ddcl_lightning.functional import Moments
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


def over_processes(moments: Moments) -> Moments:
    """Moments of the tokens of all processes."""
    number, mean, scatter = moments
    sums = sum_over_processes(torch.cat([number.unsqueeze(-1), number.unsqueeze(-1) * mean], -1))
    total, joint = sums[:, 0], sums[:, 1:] / sums[:, :1].clamp(min=1.0)
    apart = mean - joint
    between = number[:, None, None] * apart.unsqueeze(-1) * apart.unsqueeze(-2)
    return Moments(total, joint, sum_over_processes(scatter + between))


def joint_spread(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squared distances ``()`` of the valid ones of tokens ``(N, d)`` of all processes from their mean."""
    mean, number = joint_mean(tokens, mask)
    return joint_covariance(tokens, mask, mean, number, diagonal=True).sum() * number.sum()


class RelativeErrors(NamedTuple):
    """Errors of codes relative to the variance of the tokens.

    Attributes:
        shares: Mean square of each residual as a share of the variance, ``(R,)``.
        spread: Sum of squared distances of the tokens from their mean, ``()``.
        number: Tokens, ``()``.
    """

    shares: Tensor
    spread: Tensor
    number: Tensor


@torch.no_grad()
def relative_errors(residuals: Sequence[Tensor], tokens: Tensor, mask: Tensor | None, *, joint: bool) -> RelativeErrors:
    """Errors of R residuals, what codes leave of the tokens; the valid ones of tokens ``(*, d)`` count.

    Args:
        residuals: R of the shape of the tokens.
        tokens: ``(*, d)``.
        mask: ``(*)`` boolean, True for valid tokens, or None.
        joint: Count the tokens of all processes, not only those of this one.
    """
    reduce = sum_over_processes if joint else _of_this_process
    rows = None if mask is None else mask.flatten()
    z = zero_padding(tokens.detach().flatten(0, -2).to(accumulation_dtype(tokens)), rows)
    rests = [zero_padding(value.detach().flatten(0, -2).to(z.dtype), rows).square().sum() for value in residuals]
    valid = torch.ones_like(z[:, 0]) if rows is None else rows.to(z.dtype)
    number, *sums = reduce(torch.cat([torch.stack([valid.sum(), *rests]), z.sum(0)])).unbind()
    rest, total = torch.stack(sums[: len(rests)]), torch.stack(sums[len(rests) :])
    spread = reduce(zero_padding(z - total / number.clamp(min=1.0), rows).square().sum())
    return RelativeErrors(rest / spread.clamp(min=torch.finfo(spread.dtype).tiny), spread, number)


def unbiased_error(residual: Tensor, tokens: Tensor) -> Tensor:
    """Error ``()`` of one residual relative to the unbiased variance: few tokens are close to their own mean."""
    errors = relative_errors([residual], tokens, None, joint=False)
    return unbiased(errors.shares[0], errors.number)


def unbiased(share: Tensor, number: Tensor) -> Tensor:
    """A share ``()`` of the variance of so many tokens as one of their unbiased variance."""
    return share * (number - 1).clamp(min=1.0) / number.clamp(min=1.0)


def _of_this_process(values: Tensor) -> Tensor:
    return values
