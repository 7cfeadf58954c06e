"""Training prototypes to give out what the MLPs made that they stand for, without labels."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning._utils.reservoir import Reservoir
from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.adapters.mask import mask_of_call
from ddcl_lightning.adapters.mlp_blocks import CHUNK
from ddcl_lightning.adapters.replacement import FeedForwardReplacement
from ddcl_lightning.optim.schedule import LRSchedule

START_TOKENS = 8192  # for k-means and least squares
HELD_OUT = 0.1  # of the collected tokens, to judge the distilled layer on
WARMUP = 50  # steps


class Distilled(NamedTuple):
    """Result of the distillation of one layer; errors are relative to the variance of the MLP's held-out outputs.

    Attributes:
        name: Qualified name of the block's MLP.
        tokens: Valid tokens that it was trained on.
        start: Squared error before training, after the start from k-means.
        error: Squared error at the end.
    """

    name: str
    tokens: int
    start: float
    error: float


@torch.no_grad()
def initialize_feedforward(
    replacement: FeedForwardReplacement,
    batches: Iterable[Any],
    *,
    max_tokens: int = START_TOKENS,
    num_restarts: int = 1,
    seed: int = 0,
) -> None:
    """Start every new layer from the valid tokens that its MLP sees in the original model, and what that makes of them.

    See :meth:`DDCLFeedForward.start_from`; a layer of another kind must have that method too.

    Args:
        replacement: What :func:`replace_feedforward` returned.
        batches: Inputs of the model: mappings that become its keyword arguments, tensors, or sequences that start with
            one.
        max_tokens: Size of the sample of each block.
        num_restarts: Runs of k-means per head.
        seed: Seed of sample and k-means.

    Raises:
        ValueError: If there is no valid token, or fewer distinct ones than prototypes.
    """
    _require_layers(replacement)
    with replacement._original_model():
        tokens = _collect(replacement, list(replacement.layers), batches, max_tokens, seed)
    for name, layer in replacement.layers.items():
        _start(layer, tokens[name], replacement._sites[name](tokens[name]), num_restarts, seed)


def distill_feedforward(
    replacement: FeedForwardReplacement,
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    lr: float = 1e-2,
    batch_tokens: int = 512,
    max_tokens: int = 32_768,
    sequential: bool = True,
    initialize: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> list[Distilled]:
    """Train every new layer to give out what its MLP makes of the valid tokens that reach it, without labels.

    Each layer is trained on its own, on a sample of tokens in memory (AdamW, cosine schedule, squared error); the rest
    of the model stays as it is and runs in evaluation mode.

    Args:
        replacement: What :func:`replace_feedforward` returned.
        batches: See :func:`initialize_feedforward`; read once per block if ``sequential``, else once.
        steps: Steps of AdamW per block, at least 1.
        lr: Largest learning rate, > 0.
        batch_tokens: Tokens per step.
        max_tokens: Size of the sample of each block. It is held twice, once for all blocks if not ``sequential``.
        sequential: Block by block on the tokens of the model as replaced so far, so that a layer is good at the tokens
            that it will get; otherwise all on the tokens of the original model.
        initialize: Start from k-means and least squares first, on up to 8,192 of the tokens; False goes on from where
            the layers are.
        seed: Seed of samples, k-means and order.
        progress: Show a bar per block.

    Returns:
        One :class:`Distilled` per block.

    Raises:
        ValueError: If an argument is out of its range, there are too few valid tokens, or ``batches`` can be read only
            once while several blocks need it.
    """
    for argument, value in (("steps", steps), ("batch_tokens", batch_tokens), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1; got {value}. Pass 1 or more.")
    if not lr > 0:
        raise ValueError(f"lr must be > 0; got {lr}. Leave it out for the default.")
    _require_layers(replacement)
    if sequential and len(replacement.layers) > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches must be readable once per block with sequential=True; got a {type(batches).__name__}, which "
            "ends. Pass a list or a data loader, or set sequential=False."
        )
    names = list(replacement.layers)
    at_once: dict[str, Tensor] = {}
    if not sequential:
        with replacement._original_model():
            at_once = _collect(replacement, names, batches, max_tokens, seed)
    results = []
    for name in names:
        tokens = at_once.pop(name) if at_once else _collect(replacement, [name], batches, max_tokens, seed)[name]
        results.append(_distill(name, replacement, tokens, steps, lr, batch_tokens, initialize, seed, progress))
    return results


def _distill(
    name: str,
    replacement: FeedForwardReplacement,
    tokens: Tensor,
    steps: int,
    lr: float,
    batch_tokens: int,
    initialize: bool,
    seed: int,
    progress: bool,
) -> Distilled:
    layer = replacement.layers[name]
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    held_out = max(1, int(HELD_OUT * len(tokens)))
    if len(tokens) < 2:
        raise ValueError(f"batches must give at least 2 valid tokens to {name}; got {len(tokens)}. Pass 2 or more.")
    with torch.no_grad():
        targets = replacement._sites[name](tokens)
    x, y = tokens[held_out:], targets[held_out:]
    like, training = next(layer.parameters()), layer.training
    dtype = like.dtype
    layer.float()
    try:
        if initialize:
            _start(layer, x[:START_TOKENS], y[:START_TOKENS], 1, seed)
        first = _relative_error(layer, tokens[:held_out], targets[:held_out])
        layer.train()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
        variance = y.var(0, correction=0).mean().clamp(min=torch.finfo(y.dtype).tiny)
        schedule = LRSchedule("cosine", min(WARMUP, steps // 10))
        with torch.enable_grad():
            for step in tqdm(range(steps), desc=f"distilling {name}", disable=not progress, leave=False):
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule.factor(step, steps)
                rows = torch.randint(len(x), (batch_tokens,), generator=generator)
                loss = (layer(x[rows].to(like.device)) - y[rows].to(like.device)).square().mean() / variance.to(
                    like.device
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        last = _relative_error(layer, tokens[:held_out], targets[:held_out])
    finally:
        layer.to(dtype).train(training)
        layer.zero_grad()
        if isinstance(layer, PrototypeAdapter):
            layer.terms = None
    return Distilled(name, len(x), first, last)


@torch.no_grad()
def _relative_error(layer: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """Squared error over the variance of the targets."""
    like = next(layer.parameters())
    with evaluating(layer):
        outputs = torch.cat([layer(rows.to(like)).cpu() for rows in torch.split(tokens, CHUNK)])
    spread = (targets - targets.mean(0)).square().sum().clamp(min=torch.finfo(targets.dtype).tiny)
    return float((outputs - targets).square().sum() / spread)


def _start(layer: nn.Module, tokens: Tensor, targets: Tensor, num_restarts: int, seed: int) -> None:
    start: Any = getattr(layer, "start_from", None)
    if start is None:
        raise ValueError(
            f"a layer that is started from data must have start_from(tokens, targets), as DDCLFeedForward; got a "
            f"{type(layer).__name__}. Set initialize=False to distill it from where it is."
        )
    like = next(layer.parameters())
    start(tokens.to(like), targets.to(like), num_restarts=num_restarts, seed=seed)


def _require_layers(replacement: FeedForwardReplacement) -> None:
    if not replacement.layers:
        raise ValueError("replacement must be in place; got one that was restored. Call replace_feedforward again.")


@torch.no_grad()
def _collect(
    replacement: FeedForwardReplacement, names: list[str], batches: Iterable[Any], max_tokens: int, seed: int
) -> dict[str, Tensor]:
    """A uniform sample of the valid tokens that reach each name, ``(M, D)`` float32 on the CPU."""
    model, reservoirs = replacement.model, {name: Reservoir(max_tokens, seed) for name in names}
    mask: Tensor | None = None

    def read_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal mask
        mask = mask_of_call(model, replacement.mask, args, kwargs)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            tokens: Tensor = args[0]
            if mask is not None and mask.shape != tokens.shape[:-1]:
                raise ValueError(
                    f"mask {replacement.mask!r} must have the shape of the tokens of {name}, "
                    f"{tuple(tokens.shape[:-1])}; got {tuple(mask.shape)}. Name another argument, or none."
                )
            reservoirs[name].add(tokens.flatten(0, -2).float(), None if mask is None else mask.flatten())

        return hook

    device = next(model.parameters()).device
    handles = [model.register_forward_pre_hook(read_mask, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with evaluating(model):
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**{key: _to(value, device) for key, value in batch.items()})
                else:
                    model(_to(batch if isinstance(batch, Tensor) else batch[0], device))
    finally:
        for handle in handles:
            handle.remove()
        for layer in replacement.layers.values():
            if isinstance(layer, PrototypeAdapter):
                layer.terms = layer.mask = None
    return {name: reservoir.gather() for name, reservoir in reservoirs.items()}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
