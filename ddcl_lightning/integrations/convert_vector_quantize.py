"""Codebooks that vector-quantize-pytorch has trained, in quantizers of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.projected_quantizer import ProjectedQuantizer
from ddcl_lightning.nn.quantizer import SoftVectorQuantizer
from ddcl_lightning.nn.residual_quantizer import ResidualVectorQuantizer

REFUSED = {  # attributes of a layer that change what its codes are
    "layernorm": "layernorm_after_project_in=True",
    "vq_bridge": "a vq_bridge",
    "affine_param": "affine_param=True",
    "implicit_neural_codebook": "implicit_neural_codebook=True",
    "soft_clamp_input_value": "soft_clamp_input_value",
}
RESIDUAL_REFUSED = {  # numbers above 1 of a ResidualVQ
    "eval_beam_size": "a beam search (beam_size, eval_beam_size)",
    "beam_size": "a beam search (beam_size, eval_beam_size)",
}
PROBES, AGREEMENT = 256, 0.99  # tokens on which a conversion is tried, and the share that must come out the same
TOLERANCE = 1e-4  # of the largest number, within which vectors are the same
CHANNELS_LAST = {"accept_image_fmap": False, "accept_3d_fmap": False, "channel_last": True}  # attributes of layers


@torch.no_grad()
def convert_quantizer(layer: nn.Module, tokens: Tensor | None = None, **options: Any) -> ProjectedQuantizer:
    """Quantizer with the codes and projections of a ``VectorQuantize`` or ``ResidualVQ`` of vector-quantize-pytorch.

    In evaluation it gives the layer's indices and vectors. In training its codes move as ours do, so that dead ones
    come back; with tokens they do at once.

    Args:
        layer: Of that library, trained.
        tokens: In the shape of its input: a sample of many more tokens than codes, on which codes that have hardly a
            token are moved to crowded cells, see
            :meth:`~ddcl_lightning.nn.projected_quantizer.ProjectedQuantizer.revive`. None: codes are copied as they
            are.
        **options: Further arguments of our quantizer.

    Returns:
        A :class:`~ddcl_lightning.SoftVectorQuantizer` or :class:`~ddcl_lightning.ResidualVectorQuantizer`, in the mode
        and on the device of the layer.

    Raises:
        TypeError: If the layer is something else.
        ValueError: If it has an option that ours has no counterpart of, so that indices would be others; if an option
            is one that the layer decides, or the tokens are too few or not finite.
    """
    levels = _levels(layer)
    codes = [_codes(level) for level in levels]
    heads, size, code_dim = codes[0].shape
    is_residual = type(layer).__name__ == "ResidualVQ"
    projections = _projections(layer if is_residual else levels[0])
    dim = heads * code_dim if projections[0] is None else projections[0].in_features
    decided = {
        "code_dim": code_dim,
        "num_heads": heads,
        "embedding_scale": "unit" if levels[0].use_cosine_sim else "none",
        "channels": "first" if _has_channels_first(layer, levels[0]) else None,
    }
    if taken := {*decided, "dim", "num_codes", "num_levels", "shared_codebook"} & options.keys():
        raise ValueError(f"options must not name what the layer decides; got {', '.join(sorted(taken))}. Leave it out.")
    options |= decided
    quantizer: SoftVectorQuantizer | ResidualVectorQuantizer
    if is_residual:
        options = {"shared_codebook": bool(layer.shared_codebook), **options}
        quantizer = ResidualVectorQuantizer(dim, size, len(levels), **options)
    else:
        quantizer = SoftVectorQuantizer(dim, size, **options)
    for bank, values in zip(find_banks(quantizer).values(), codes, strict=False):  # one bank for all, if it is shared
        bank.set_prototypes(values.to(bank.prototypes))
    for own, source in zip((quantizer.input_projection, quantizer.output_projection), projections, strict=True):
        if own is not None and source is not None:
            own.load_state_dict(source.state_dict())
    quantizer.to(codes[0].device).train(layer.training)
    _require_same_results(layer, quantizer, dim, decided["channels"] == "first")
    if tokens is not None:
        quantizer.revive(tokens)
    return quantizer


def _levels(layer: nn.Module) -> list[Any]:
    """The layers of a ``ResidualVQ``, or the one of a ``VectorQuantize``, if ours can hold their codes."""
    kind = type(layer).__name__
    if not type(layer).__module__.startswith("vector_quantize_pytorch") or kind not in ("VectorQuantize", "ResidualVQ"):
        raise TypeError(
            f"layer must be a VectorQuantize or ResidualVQ of vector-quantize-pytorch; got {kind}. Set the codes of "
            "another quantizer by bank.set_prototypes()."
        )
    levels: list[Any] = list(layer.layers) if kind == "ResidualVQ" else [layer]  # type: ignore[arg-type]
    if kind == "ResidualVQ":
        refused = [option for name, option in RESIDUAL_REFUSED.items() if (getattr(layer, name, None) or 1) > 1]
        refused += ["implicit_neural_codebook=True"] * bool(getattr(layer, "implicit_neural_codebook", False))
        if levels[0].use_cosine_sim:
            refused.append("use_cosine_sim=True at several levels, where each scales its residual anew")
        if refused:
            raise ValueError(
                f"layer has {refused[0]}, of which our quantizers have no counterpart; got {layer}. Keep the layer as "
                "it is."
            )
    for level in levels:
        _require_counterpart(level)
    sizes = [level.codebook_size for level in levels]
    if len(set(sizes)) > 1:
        raise ValueError(f"layer must have as many codes at every level; got {sizes}. Keep the layer as it is.")
    return levels


def _require_counterpart(level: Any) -> None:
    """Raise a ValueError for a layer whose codes ours cannot hold."""
    for name, option in REFUSED.items():
        if getattr(level, name, False) or getattr(level._codebook, name, False):
            raise ValueError(
                f"layer has {option}, of which our quantizers have no counterpart; got {level}. Keep the layer as it "
                "is."
            )
    if not isinstance(level.project_in, (nn.Linear, nn.Identity)):
        raise ValueError(
            f"layer must project its tokens by a linear layer or not at all; got {level.project_in}. Copy its codes by "
            "bank.set_prototypes(), and keep the projection in front."
        )


def _require_same_results(
    layer: Any, quantizer: SoftVectorQuantizer | ResidualVectorQuantizer, dim: int, has_channels_first: bool
) -> None:
    """Raise a ValueError if the two make something else of tokens of the codes' own scale, whatever the reason."""
    spread, mean = torch.std_mean(quantizer.codebook.float())
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(PROBES, dim, generator=generator) * spread.cpu() + mean.cpu()).to(quantizer.codebook)
    # Each token is quantized by itself, whatever the layout: versions of the library fail on maps of a ResidualVQ.
    with evaluating(layer), evaluating(quantizer), _channels_last(layer):
        vectors, indices = _call(layer, tokens.unsqueeze(0))
        own = quantizer(tokens.T.unsqueeze(0) if has_channels_first else tokens.unsqueeze(0))
    quantized = own.quantized.mT if has_channels_first else own.quantized
    quantizer.layout.forget(3)
    if indices.numel() == own.indices.numel():  # theirs have a dimension for one level, too
        indices = indices.reshape(own.indices.shape)
    agreement = 0.0
    if indices.shape == own.indices.shape and vectors.shape == quantized.shape:
        gap, size = ((vectors - value).abs().amax(-1) for value in (quantized, 0.0))
        close = gap <= TOLERANCE * size.max()
        agreement = min(float(value.float().mean()) for value in (indices == own.indices, close))
    if agreement < AGREEMENT:
        raise ValueError(
            f"layer gives other indices or vectors than its codes in our quantizer to {1 - agreement:.0%} of random "
            f"tokens, so it has an option that ours has no counterpart of; got {layer}. Keep the layer as it is."
        )


def _call(layer: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors and indices of tokens ``(B, N, D)`` in a layer."""
    try:
        vectors, indices = layer(tokens)[:2]
    except Exception as error:
        raise ValueError(
            f"layer must take tokens {tuple(tokens.shape)} in evaluation mode, on which the conversion is tried; its "
            f"own call ends in {type(error).__name__}: {error}. Set the codes of ours by bank.set_prototypes()."
        ) from error
    return vectors, indices


@contextmanager
def _channels_last(layer: nn.Module) -> Iterator[None]:
    """Context manager in which a layer takes ``(B, N, D)``, whatever the layout of its input."""
    before = [
        (module, name, getattr(module, name))
        for module in layer.modules()
        for name in CHANNELS_LAST
        if isinstance(getattr(module, name, None), bool)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, CHANNELS_LAST[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _codes(level: Any) -> Tensor:
    """Codes ``(H, K, d)`` of a layer."""
    codes: Tensor = level._codebook.embed.detach()
    if not bool(level._codebook.initted.all()):
        raise ValueError(
            "layer has not started its codes yet: it has seen no batch. Construct a new quantizer instead."
        )
    return codes.expand(level.heads, -1, -1)


def _projections(layer: Any) -> tuple[nn.Linear | None, nn.Linear | None]:
    """Into the space of the codes and back, where there are any."""
    both = (layer.project_in, layer.project_out)
    return tuple(  # type: ignore[return-value]
        projection if isinstance(projection, nn.Linear) else None for projection in both
    )


def _has_channels_first(layer: Any, level: Any) -> bool:
    maps = layer.accept_image_fmap or level.accept_image_fmap or getattr(level, "accept_3d_fmap", False)
    return bool(maps or not level.channel_last)
