"""Prototypes inside a network (section 8.7): after a block, beside one, or in the place of a LayerNorm."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.adapters.mask import MaskReader

CHILD = "prototypes"  # the name under which a block holds what was inserted after it


def quantization_loss(module: nn.Module) -> Tensor:
    """``L_q`` of the last call of all prototype adapters inside of ``module``, summed over them and their heads.

    The terms of a call can be read once: add the result to the loss of the same step. Without it the prototypes learn
    from the task alone; with a large weight an encoder shrinks its tokens.

    Raises:
        ValueError: If the module holds no adapter.
        RuntimeError: If no adapter was called since the last time.
    """
    placed = [adapter for adapter in module.modules() if isinstance(adapter, PrototypeAdapter)]
    if not placed:
        raise ValueError(
            f"module must hold prototype adapters; found none in {type(module).__name__}. Use insert_prototypes, or "
            "SerialPrototypes, GatedPrototypes or PrototypeNorm in your own network."
        )
    losses = [adapter.terms.loss.sum() for adapter in placed if adapter.terms is not None]
    if not losses:
        raise RuntimeError("the prototype adapters have no loss terms to read. Call the network once for each loss.")
    for adapter in placed:
        adapter.terms = None
    return torch.stack(losses).sum()


def insert_prototypes(
    model: nn.Module, blocks: Iterable[str], create: Callable[[], PrototypeAdapter], *, mask: str | None = None
) -> list[PrototypeAdapter]:
    """Insert prototypes after (or beside) blocks of an existing model, such as one of Hugging Face or timm.

    Each adapter becomes a child of its block, under the name ``prototypes``: it is trained, moved, saved and found by
    callbacks with the model, whose other names stay as they are. A copy of the model has adapters of its own.

    Args:
        model: Holds the blocks; changed in place, until :func:`remove_prototypes`.
        blocks: Qualified names, such as ``[f"encoder.layer.{i}" for i in range(12)]``. The first input of a block is
            tokens ``(B, T, D)``; its output is tokens, or a tuple that starts with them.
        create: Called once per block. To share prototypes, give the layers one bank.
        mask: Name of the argument of ``model.forward`` that is a ``(B, T)`` mask, not zero for valid tokens
            (``"attention_mask"``); None if all tokens are valid.

    Returns:
        The adapters, in the order of the blocks.

    Raises:
        ValueError: If a name is unknown or its block is taken, a container or a repeated one, ``mask`` names no
            argument, or ``create`` returns the same module twice; nothing is inserted then.
    """
    names = list(blocks)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"blocks must name modules of the model; got {name!r}. Did you mean one of {close}?")
        if isinstance(known[name], (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"blocks must not name containers, whose children are what they run; got {name!r}, a "
                f"{type(known[name]).__name__}. Name the last of its blocks."
            )
        if hasattr(known[name], CHILD):
            raise ValueError(f"block {name!r} has {CHILD} already. Call remove_prototypes(model) first.")
    if len({id(known[name]) for name in names}) < len(names) or not names:
        raise ValueError(
            f"blocks must name at least one block, and each once; got {names}. Give their numbers, or leave blocks out."
        )
    if mask is not None and mask not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"mask must name an argument of {type(model).__name__}.forward; got {mask!r}. Name one that holds the "
            "mask, or leave mask out."
        )
    placed = [create() for _ in names]
    if len({id(adapter) for adapter in placed}) < len(placed):
        raise ValueError(
            "create must return a new module at each call; got one twice. Share prototypes by giving layers one bank."
        )
    for name, adapter in zip(names, placed, strict=True):
        known[name].add_module(CHILD, adapter)
        _keep(adapter, known[name].register_forward_hook(_merge, with_kwargs=True))
    if mask is not None:
        # The first one keeps the handle, so that it goes with the model's copies.
        _keep(placed[0], model.register_forward_pre_hook(MaskReader(mask), with_kwargs=True))
    return placed


def remove_prototypes(model: nn.Module) -> list[PrototypeAdapter]:
    """Undo every :func:`insert_prototypes` on a model: remove and return the adapters and their hooks."""
    removed = []
    for block in list(model.modules()):
        adapter = getattr(block, CHILD, None)
        if isinstance(adapter, PrototypeAdapter) and adapter.__dict__.get("_handles"):
            for handle in adapter.__dict__.pop("_handles"):
                handle.remove()
            delattr(block, CHILD)
            removed.append(adapter)
    return removed


def _keep(adapter: PrototypeAdapter, handle: RemovableHandle) -> None:
    adapter.__dict__.setdefault("_handles", []).append(handle)


# A function of the module, not a closure: a deep copy of the model must call its own prototypes, not the original's.
def _merge(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of a block."""
    adapter = getattr(block, CHILD)
    tokens = output[0] if isinstance(output, (tuple, list)) and output else output
    inputs = args[0] if args else kwargs.get(next(iter(inspect.signature(block.forward).parameters)))
    for name, value in (("input", inputs), ("output", tokens)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the {name} of {type(block).__name__} must be tokens, or a tuple that starts with them, for "
                f"prototypes to stand after it; got {type(value).__name__}. Name another block."
            )
    merged = adapter.merge(inputs, tokens)
    return type(output)([merged, *output[1:]]) if isinstance(output, (tuple, list)) else merged
