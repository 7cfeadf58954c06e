"""The batch convention: a dict with ``x`` (or ``text``), ``y``, ``mask`` and ``index``, or a plain ``(x, y)`` pair."""

from typing import Any

from torch import Tensor

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


def mask(batch: Batch) -> Tensor | None:
    """Mask ``(B, T)``, True for valid tokens: ``batch["mask"]``, else None."""
    return batch.get("mask") if isinstance(batch, dict) else None


def index(batch: Batch) -> Tensor | None:
    """Numbers ``(B,)`` of the samples in the user's data: ``batch["index"]``, else None.

    A sample keeps its number whatever is dropped, split off, limited or shuffled, so that predictions can be joined
    with the data. It is unique within a data loader.
    """
    return batch.get("index") if isinstance(batch, dict) else None


def _describe(batch: Batch) -> str:
    if isinstance(batch, dict):
        return f"a dict with keys {sorted(map(str, batch))}"
    return type(batch).__name__
