"""Moments of valid tokens; over several processes in tests/utils/test_distributed.py."""

import torch

from ddcl_lightning.nn.joint_moments import joint_covariance, joint_mean


def test_joint_moments_are_those_of_the_valid_tokens() -> None:
    tokens, mask = torch.randn(2, 50, 4, dtype=torch.float64) + 3, torch.rand(2, 50) < 0.5
    poisoned = tokens.masked_fill(~mask.unsqueeze(-1), torch.nan)
    mean, number = joint_mean(poisoned, mask)
    covariance = joint_covariance(poisoned, mask, mean, number)
    for head in range(2):
        valid = tokens[head][mask[head]]
        assert int(number[head]) == len(valid)
        torch.testing.assert_close(mean[head], valid.mean(0))
        torch.testing.assert_close(covariance[head], valid.T.cov(correction=0))
    variances = joint_covariance(poisoned, mask, mean, number, diagonal=True)
    torch.testing.assert_close(variances, covariance.diagonal(dim1=-2, dim2=-1))


def test_joint_moments_of_no_token_are_zero() -> None:
    mean, number = joint_mean(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool))
    assert mean.tolist() == [[0.0, 0.0]]
    assert number.tolist() == [[0.0]]
