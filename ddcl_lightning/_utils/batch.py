"""The batch convention: a dict with ``x`` (or ``text``), ``y``, ``mask`` and ``index``, or a plain ``(x, y)`` pair."""

import re
from typing import Any

import torch
from torch import Tensor

MASK, ATTENTION_MASK = "mask", "attention_mask"
_OF_MASKS = ("mask", "pad", "valid")  # in names of what tells padding
_OF_LENGTHS = re.compile(r"len(gth)?s?(_|$)|n(um)?_tokens")

Batch = Any  # whatever the data loader yields; the functions below read the usual forms


def inputs(batch: Batch) -> Tensor:
    """The input tensor of a batch: ``batch["x"]``, the first of a pair, or the tensor itself."""
    value = (
        batch.get("x") if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    )
    if not isinstance(value, Tensor):
        raise TypeError(
            "batch must be a dict with a tensor 'x', a pair (x, y) or a tensor; got "
            f"{_describe(batch)}. Change the collate function, or write a backbone that reads your batch."
        )
    return value


def texts(batch: Batch) -> list[str]:
    """The raw texts of a batch, B of them: ``batch["text"]``.

    Raises:
        TypeError: If there are none.
    """
    value = batch.get("text") if isinstance(batch, dict) else None
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise TypeError(
            f"batch must be a dict with a list of strings 'text'; got {_describe(batch)}. Use one of the text data "
            "modules, or a collate function that keeps the texts."
        )
    return list(value)


def size(batch: Batch) -> int:
    """B, the number of samples of a batch."""
    if isinstance(batch, dict) and "text" in batch:
        return len(batch["text"])
    return len(inputs(batch))


def labels(batch: Batch) -> Tensor | None:
    """Labels ``(B,)`` of a batch: ``batch["y"]`` or the second of a pair, else None."""
    if isinstance(batch, dict):
        return batch.get("y")
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        value: Tensor = batch[1]
        return value
    return None


def class_labels(batch: Batch) -> Tensor:
    """One class per sample, ``(B,)`` int64 on the CPU; -1 where there is none, or the target is no class."""
    truth = labels(batch)
    if truth is None or truth.dim() != 1 or truth.is_floating_point():
        return torch.full((size(batch),), -1)
    return truth.detach().cpu().long()


def token_mask(batch: Batch, tokens: Tensor | None = None) -> Tensor | None:
    """Mask ``(B, T)``, True for valid tokens: ``batch["mask"]``, or the ``attention_mask`` of a tokenizer; else None.

    Every backbone that reads padding asks here, so that padding which comes under another name, in another shape or the
    other way round is refused instead of read as tokens.

    Args:
        batch: As the data loader yields it.
        tokens: What the mask is of, ``(B, T, ...)``; without it only ``batch["mask"]`` is looked up.

    Returns:
        Boolean, on the device of the tokens.

    Raises:
        ValueError: If padding is told in any other way, or (looked at on the CPU only) a sample is all padding.
    """
    if tokens is None:
        return batch.get("mask") if isinstance(batch, dict) else None
    name = _mask_name(batch, tokens)
    if name is None:
        return None
    value = batch[name]
    # Looking at the values on an accelerator would wait for it in every step.
    looks = isinstance(value, Tensor) and value.device.type == "cpu" and not torch.compiler.is_compiling()
    if name == ATTENTION_MASK and _is_integer(value) and not (looks and bool(((value != 0) & (value != 1)).any())):
        value = value.bool()
    shape = tuple(tokens.shape[:2])
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != shape:
        received = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be boolean of the shape of x, {shape}; got {received}. Convert it in the collate function, "
            "to True for valid tokens."
        )
    value = value.to(tokens.device)
    if looks and not bool(value.any(1).all()):
        raise ValueError(f"{name} leaves no token in {int((~value.any(1)).sum())} samples; drop them, or keep one.")
    return value


def refuse_mask(batch: Batch, reader: str) -> None:
    """Raise if a batch has a mask of tokens, for a backbone that makes its own: what it would hide would be read.

    Raises:
        ValueError: Naming the backbone.
    """
    for name in (MASK, ATTENTION_MASK):
        value = batch.get(name) if isinstance(batch, dict) else None
        if isinstance(value, Tensor) and value.dim() == 2:  # one of images (a segmentation) has more
            raise ValueError(
                f"{reader} reads whole images, so the batch must have no mask of tokens; got {name!r} of shape "
                f"{tuple(value.shape)}. Leave it out, or crop the images."
            )


def index(batch: Batch) -> Tensor | None:
    """Numbers ``(B,)`` of the samples in the user's data: ``batch["index"]``, else None.

    A sample keeps its number whatever is dropped, split off, limited or shuffled, so that predictions can be joined
    with the data. It is unique within a data loader.
    """
    return batch.get("index") if isinstance(batch, dict) else None


def _mask_name(batch: Batch, tokens: Tensor) -> str | None:
    """Under which name the mask of a batch is; refuses what tells padding in any other way."""
    if not isinstance(batch, dict):
        if isinstance(batch, (tuple, list)) and any(_is_mask(value) for value in batch[1:]):
            raise ValueError(
                "a pair holds x and y alone; got a boolean tensor of two dimensions behind x. Give the batch as a dict "
                "with 'x', 'y' and 'mask'."
            )
        return None
    names = [name for name in (MASK, ATTENTION_MASK) if batch.get(name) is not None]
    if len(names) > 1:
        raise ValueError(f"a batch must have one mask; got {names[0]!r} and {names[1]!r}. Leave one of them out.")
    others = [] if names else [name for name in batch if _tells_padding(name, batch[name], tokens)]
    if others:
        raise ValueError(
            f"padding must be told by a boolean 'mask' of shape {tuple(tokens.shape[:2])}, True for valid tokens; got "
            f"{others[0]!r}. Rename it, and turn it over (~) if it is True for padding; leave it out if it is neither."
        )
    return names[0] if names else None


def _tells_padding(name: Any, value: Any, tokens: Tensor) -> bool:
    lowered, samples, length = str(name).lower(), *tokens.shape[:2]
    if length == 1 or lowered in ("x", "y", "index", "text", "special_tokens_mask"):
        return False
    of_lengths = _OF_LENGTHS.search(lowered) is not None
    of_masks = any(word in lowered for word in _OF_MASKS)
    if not isinstance(value, Tensor) and (of_lengths or of_masks):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return False  # no numbers
    if not isinstance(value, Tensor):
        return False
    if of_lengths:
        return value.shape in ((samples,), (samples + 1,)) and _is_integer(value)
    if _is_bool(value) and value.shape == (samples, length):
        return True  # whatever it is called
    return of_masks and ("pad" in lowered or value.numel() == samples * length)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex() or _is_bool(value))


def _is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _is_mask(value: Any) -> bool:
    return _is_bool(value) and value.dim() == 2


def _describe(batch: Batch) -> str:
    if isinstance(batch, dict):
        return f"a dict with keys {sorted(map(str, batch))}"
    return type(batch).__name__
