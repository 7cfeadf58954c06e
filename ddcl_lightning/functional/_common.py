"""Argument checks, masked means and chunking shared by the functional modules."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import described

CHUNK_ELEMENTS = 1 << 22  # entries of one N x K block in the streamed functions: 32 MiB in float64


def require_floating(tokens: Tensor, argument: str = "tokens") -> None:
    """Raise unless tokens are a floating-point tensor with a dimension for their values.

    Raises:
        TypeError: If they are no tensor, or one of integers, booleans or complex numbers.
        ValueError: If they are a single number.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{argument} must be a tensor; got {type(tokens).__name__}. Convert them by torch.as_tensor.")
    if not tokens.is_floating_point():
        remedy = (
            "Give real and imaginary parts side by side, torch.view_as_real(tokens).flatten(-2)."
            if tokens.is_complex()
            else f"Convert with {argument}.float()."
        )
        raise TypeError(f"{argument} must be floating point; got {tokens.dtype}. {remedy}")
    if tokens.dim() == 0:
        raise ValueError(f"{argument} must be vectors, (..., d); got a single number. Give them a last dimension.")


def require_integers(argument: str, values: Tensor) -> None:
    """Raise a TypeError unless values are a tensor of integers."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{argument} must be a tensor of integers; got {described(values)}. Use torch.as_tensor.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{argument} must be integers; got {values.dtype}. Take the argmax or use .long().")


def require_finite_tokens(tokens: Tensor, argument: str = "tokens") -> None:
    """Raise a ValueError if a value is NaN or infinite; padding must be zero or gone."""
    if not bool(torch.isfinite(tokens).all()):
        raise ValueError(
            f"{argument} must be finite; got NaN or infinity among the valid ones. Check data and encoder."
        )


def check_shapes(tokens: Tensor, prototypes: Tensor, mask: Tensor | None) -> None:
    """Raise unless tokens are floating point and the shapes fit the convention of this package; names the argument."""
    require_floating(tokens)
    if tokens.dim() < 2 or prototypes.dim() < 2:
        raise ValueError(
            "tokens and prototypes must have at least 2 dimensions, (..., N, d) and (..., K, d); "
            f"got {tuple(tokens.shape)} and {tuple(prototypes.shape)}. Add the missing dimension with unsqueeze."
        )
    if tokens.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            "tokens and prototypes must share their last dimension d; got tokens with "
            f"d = {tokens.shape[-1]} and prototypes with d = {prototypes.shape[-1]}. Project the tokens or change the "
            "prototype dimension."
        )
    if tokens.shape[:-2] != prototypes.shape[:-2]:
        raise ValueError(
            "tokens and prototypes must share their leading dimensions; got "
            f"{tuple(tokens.shape[:-2])} and {tuple(prototypes.shape[:-2])}. Flatten batch and time into N, and expand "
            "heads."
        )
    check_mask(tokens, mask)


def check_mask(tokens: Tensor, mask: Tensor | None, owner: str = "tokens without its last dimension") -> None:
    """Raise unless ``mask`` is None or boolean with the shape of ``tokens`` without its last dimension.

    ``owner`` says in the error whose shape that is.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor; got {type(mask).__name__}. Use torch.as_tensor(mask).")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean with True for valid tokens; got {mask.dtype}. Use mask.bool() where 1 is valid, and "
            "mask == 0 where it is additive."
        )
    if mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"mask must have the shape of {owner}, {tuple(tokens.shape[:-1])}; got {tuple(mask.shape)}. Give one value "
            "per token."
        )


def require_tokens(tokens: Tensor, argument: str = "tokens") -> None:
    """Raise a ValueError unless there is something to take a mean over; ``argument`` names it in the error."""
    if tokens.numel() == 0:
        raise ValueError(
            f"{argument} must hold at least one token; got an empty batch, of shape {tuple(tokens.shape)}. Drop it "
            "from the data."
        )


def require_finite(tokens: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if a valid token is not finite; looks on a CPU only, where that is cheap."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    require_finite_tokens(tokens if mask is None else tokens[mask])


def require_valid_token(tokens: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if there is nothing to take a mean over; a mask is looked at on the CPU only."""
    require_tokens(tokens)
    if mask is None or torch.compiler.is_compiling() or mask.device.type != "cpu":
        return
    if not bool(mask.any()):
        raise ValueError(
            "mask leaves no valid token in the batch, so the loss has no mean. Drop empty samples from the data."
        )


def temperature_like(temperature: float | Tensor, reference: Tensor) -> Tensor:
    """Temperature as a tensor that broadcasts against ``(..., N, d)``; a float is checked, a tensor is trusted."""
    if isinstance(temperature, Tensor):
        value = temperature.to(device=reference.device, dtype=reference.dtype)
        return value.reshape(*value.shape, 1, 1) if value.dim() else value
    if not temperature > 0:
        raise ValueError(
            f"temperature must be > 0, in units of squared distance; got {temperature}. Pass a positive number, or "
            "critical_temperature of the tokens times a fraction."
        )
    return torch.as_tensor(temperature, device=reference.device, dtype=reference.dtype)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of sums: float32 for half precisions, else the widest of the inputs."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def zero_padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``(..., N, D)`` with zero where the mask ``(..., N)`` is False: no NaN there can leak into a product."""
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)


def mark_padding(codes: Tensor, mask: Tensor | None) -> Tensor:
    """Codes ``(*)`` or ``(*, H)`` with -1 where the mask ``(*)`` is False."""
    if mask is None:
        return codes
    return codes.masked_fill(~mask.reshape(*mask.shape, *[1] * (codes.dim() - mask.dim())), -1)


def check_code_range(argument: str, codes: Tensor, size: str, num_codes: int) -> None:
    """Raise a ValueError unless codes are in [0, ``num_codes``) or -1; ``size`` names that number in the error.

    Looks on a CPU only, where that is free, and not while compiling.
    """
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if codes.numel() and not (int(codes.min()) >= -1 and int(codes.max()) < num_codes):
        raise ValueError(
            f"{argument} must be in [0, {size}), or -1 for padding; got values from {int(codes.min())} to "
            f"{int(codes.max())}. Pass what encode returns."
        )


def masked_mean(values: Tensor, mask: Tensor | None, dim: Literal[-1, -2] = -1) -> Tensor:
    """Mean of values over the valid tokens.

    Args:
        values: One number ``(..., N)`` or, with ``dim=-2``, one vector ``(..., N, D)`` per token, of any float dtype.
        mask: ``(..., N)`` boolean, True for valid tokens; None if all are. Dimensions that it lacks, such as heads in
            ``(B, H, N, D)``, are those before N.
        dim: Dimension of the tokens.

    Returns:
        ``(...)`` or ``(..., D)`` in the dtype of the values; NaN where no token is valid.
    """
    if dim == -2:
        values = values.mT
    if mask is None:
        return values.mean(-1)
    valid = mask.reshape(*mask.shape[:-1], *[1] * (values.dim() - mask.dim()), mask.shape[-1])
    return values.masked_fill(~valid, 0.0).sum(-1) / valid.sum(-1)


def token_chunks(num_tokens: int, row_elements: int) -> Iterator[slice]:
    """Slices over the token dimension that bound one block to ``CHUNK_ELEMENTS`` entries.

    A compiled or exported graph has all tokens in one: a number of blocks would be that of one number of tokens.
    """
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))
