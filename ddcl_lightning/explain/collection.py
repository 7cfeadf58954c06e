"""Collecting an explanation: one pass over the training data in bounded memory, and a few inputs."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.explain.batch_summary import Observer, real_tokens
from ddcl_lightning.explain.decisions import Decider, Effects, prototype_effects
from ddcl_lightning.explain.explanation import Explanation, InputView, TokenView
from ddcl_lightning.explain.faithfulness import Faithfulness, measure
from ddcl_lightning.explain.samples import Album, positions, take
from ddcl_lightning.explain.statistics import Tally
from ddcl_lightning.module import DDCLReadoutModule

_HASH = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def collect(
    module: DDCLReadoutModule,
    datamodule: pl.LightningDataModule,
    *,
    examples: int = 5,
    inputs: int = 20,
    indices: Sequence[int] | None = None,
    max_samples: int = 10_000,
    evaluated: int = 200,
    checkpoint: str | None = None,
    to_device: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
) -> Explanation:
    """Explanation of the prototypes of a trained module by the data that belong to them.

    Prototypes are described by the training data, in one pass; inputs come from the prediction data (validation, then
    training data, where a data module has none). With a linear classifier and a head with exact contributions an
    input's prediction is a sum over tokens and prototypes. The same arguments give the same explanation.

    Args:
        module: Trained; its head must hold a prototype bank, the last of which counts. Modes, weights and the random
            state stay as they are.
        datamodule: May offer ``example(index)`` and ``class_names``.
        examples: Nearest samples per prototype, at least 1.
        inputs: Inputs to show, >= 0: a sample that depends on their places alone.
        indices: Places of inputs to show instead.
        max_samples: Training samples to read, at least 1, in the order of the loader.
        evaluated: Inputs from which mean contributions and their faithfulness are computed, >= 0.
        checkpoint: What to call the weights.
        to_device: Moves a batch to the module's device.
        progress: Show bars.

    Raises:
        ValueError: If an argument is out of its range, there is no bank or no data, an index is not in the data, or
            the data has other classes than the training data.
    """
    check_arguments(examples, inputs, indices, max_samples, evaluated)
    observer = Observer(module)
    shape = (observer.bank.num_heads, observer.bank.num_prototypes)
    decider = Decider(module, shape)
    album = _prepare(module, datamodule)
    move = to_device or (lambda batch: module.transfer_batch_to_device(batch, module.device, 0))
    with isolate_rng(), observer.watching():
        torch.manual_seed(0)  # a loader that shuffles by the global generator
        tally = Tally(*shape, examples, album)
        loader = progress_bar(single_loader(datamodule.train_dataloader(), "train_dataloader"), "training", progress)
        complete = _add_batches(tally, observer, loader, move, max_samples)
        chosen = progress_bar(_draw(datamodule, inputs, indices, max_samples), "inputs", progress)
        views = [_input_view(observer, decider, move(drawn[2]), drawn, album) for drawn in chosen]
        chosen = progress_bar(_draw(datamodule, evaluated, None, max_samples), "evaluation", progress)
        effects, faithfulness = _evaluate(decider, _head_inputs(observer, decider, (move(item[2]) for item in chosen)))
    return Explanation(
        **_names(module, datamodule),
        checkpoint=checkpoint,
        complete=complete,
        **tally.counts(),
        heads=tally.heads(observer.bank.temperature.tolist(), observer.prototypes, effects),
        inputs=views if decider.reason is None else [replace(view, decision=None) for view in views],
        **_of_predictions(observer, decider, effects, faithfulness),
    )


def _of_predictions(
    observer: Observer, decider: Decider, effects: Effects | None, faithfulness: Faithfulness | None
) -> dict[str, Any]:
    return {
        "predicts": observer.predicts,
        "no_contributions": decider.reason if observer.predicts else None,
        "reads_shares": decider.head.pools_assignments,
        "effects": (0, 0) if effects is None else (effects.samples, effects.knock_out_samples),
        "faithfulness": faithfulness,
    }


def _names(module: DDCLReadoutModule, datamodule: pl.LightningDataModule) -> dict[str, Any]:
    return {
        "data": data_name(datamodule),
        "inputs_from": input_loader(datamodule)[1],
        "model": [type(stage).__name__ for stage in (module.backbone, module.head, module.task)],
    }


def _draw(
    datamodule: pl.LightningDataModule, number: int, indices: Sequence[int] | None, limit: int
) -> Iterator[tuple[int, bool, Batch]]:
    """Inputs as :func:`choose_inputs` chooses them, at the first of them."""
    yield from choose_inputs(input_loader(datamodule)[0], number, indices, limit)


def _prepare(module: DDCLReadoutModule, datamodule: pl.LightningDataModule) -> Album:
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("predict")
    module.refuse_other_classes(datamodule)
    return Album(datamodule)


def _head_inputs(observer: Observer, decider: Decider, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor | None]]:
    """Tokens ``(T, D)`` and mask ``(T,)`` at the head's input of single samples; none where a prediction is no sum."""
    samples: list[tuple[Tensor, Tensor | None]] = []
    if not observer.predicts or decider.reason is not None:
        return samples
    for batch in batches:
        summary = observer(batch)
        if not decider.check(observer.readout, summary.predicted):
            return []
        tokens, mask = decider.inputs(observer.readout)
        samples.append((tokens[0], None if mask is None else mask[0]))
    return samples


def _evaluate(
    decider: Decider, samples: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[Effects | None, Faithfulness | None]:
    if not samples or decider.classifier is None:
        return None, None
    with torch.autocast(samples[0][0].device.type, enabled=False):
        effects = prototype_effects(decider.head, decider.classifier, samples)
        return effects, measure(decider.head, decider.classifier, samples)


def _add_batches(
    tally: Tally, observer: Observer, batches: Iterable[Batch], move: Callable[[Batch], Batch], max_samples: int
) -> bool:
    """Add batches to the tally, up to a number of samples; True if those were all."""
    for batch in batches:
        if tally.samples >= max_samples:
            return False
        tally.add(observer(move(batch)), batch)
    if not tally.samples:
        raise ValueError("the training data loader gave no batch, so there is nothing to explain. Check the data.")
    return True


def choose_inputs(
    loader: Iterable[Batch], number: int, indices: Sequence[int] | None, limit: int
) -> list[tuple[int, bool, Batch]]:
    """Single-sample batches: those of the given places, or a sample of the loader's.

    A place's rank in the sample is a hash of it, so the sample is spread over the data, the same in every order of
    them, and needs no more memory than what is kept. The model does not run here.

    Args:
        loader: Data loader, or any batches.
        number: Size of the sample.
        indices: Places wanted, in this order, or None.
        limit: Samples to read of a loader that does not know its length.

    Returns:
        Place, whether the batch itself said so, and batch: in the order of ``indices``, else of the places.

    Raises:
        ValueError: If a place is not in the data.
    """
    chosen = None if indices is None else set(indices)
    if not (number if chosen is None else chosen):
        return []
    endless = not isinstance(loader, Sequence) and not _has_length(loader)
    kept: dict[int, tuple[int, bool, Batch]] = {}
    rank: dict[int, int] = {}
    counted = 0
    for batch in loader:
        places, known = positions(batch, counted)
        counted += len(places)
        if chosen is None:
            rank |= dict(zip(places, _mixed(places), strict=True))
            best = sorted({*kept, *places}, key=rank.__getitem__)[:number]
        else:
            best = [place for place in {*kept, *places} if place in chosen]
        rows = {place: row for row, place in enumerate(places)}
        kept = {p: kept[p] if p in kept else (p, known, take(batch, rows[p])) for p in best}
        rank = {place: rank.get(place, 0) for place in kept}
        if (chosen is not None and len(kept) == len(chosen)) or (endless and counted >= limit):
            break
    if indices is None:
        return [kept[place] for place in sorted(kept)]
    missing = sorted(chosen - set(kept)) if chosen else []
    if missing:
        raise ValueError(
            f"indices must be places of samples in the data; {missing} are not among the {counted} samples of the "
            "prediction data. Take them from the column 'index' of `ddcl predict`."
        )
    return [kept[place] for place in dict.fromkeys(indices)]


def _mixed(places: Sequence[int]) -> list[int]:
    """A fixed pseudo-random rank of each place (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.asarray(places, dtype=np.int64).astype(np.uint64) + _HASH[0]
        x = (x ^ (x >> np.uint64(30))) * _HASH[1]
        x = (x ^ (x >> np.uint64(27))) * _HASH[2]
    return [int(value) for value in x ^ (x >> np.uint64(31))]


def _input_view(
    observer: Observer, decider: Decider, moved: Batch, chosen: tuple[int, bool, Batch], album: Album
) -> InputView:
    place, known, batch = chosen
    summary = observer(moved)
    tokens, special = [], 0
    if summary.spans is not None:
        spans, weights = summary.spans[0], summary.token_weights(0)
        real = real_tokens(spans)
        tokens = [_token_views(spans, real, head) for head in weights]
        special = int(summary.mask[0].sum()) - len(real)
    predicted = None if summary.predicted is None else album.class_name(int(summary.predicted[0]))
    decision = decider(observer.readout, summary, moved, album)
    sample = album.sample(batch, 0, place, known)
    return InputView(sample, predicted, summary.shares[0].numpy(), tokens, decision, special)


def _token_views(spans: Sequence[tuple[int, int]], real: Sequence[int], weights: Tensor) -> list[TokenView]:
    top, codes = weights.max(-1)
    return [TokenView(spans[place], int(codes[place]), float(top[place])) for place in real]


def check_arguments(
    examples: int, inputs: int, indices: Sequence[int] | None, max_samples: int, evaluated: int = 0
) -> None:
    """Raise a ValueError that names the argument of :func:`collect` that is out of its range."""
    smallest = {"examples": 1, "inputs": 0, "max_samples": 1, "evaluated": 0}
    for name, value in zip(smallest, (examples, inputs, max_samples, evaluated), strict=True):
        minimum = smallest[name]
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {value}. Raise it.")
    if indices is not None and any(place < 0 for place in indices):
        raise ValueError(f"indices must be places in the data, >= 0; got {min(indices)}. Pass 0 or more.")


def progress_bar(items: Iterable[Any], what: str, progress: bool) -> Iterable[Any]:
    """The items, with a bar on the terminal where progress is to be shown."""
    bar: Iterable[Any] = tqdm(items, desc=f"explain: {what}", disable=not progress, leave=False)
    return bar


def data_name(datamodule: pl.LightningDataModule) -> str:
    """Name of a data set, from that of its data module."""
    return type(datamodule).__name__.removesuffix("DataModule") or type(datamodule).__name__


def input_loader(datamodule: pl.LightningDataModule) -> "tuple[Iterable[Batch], str]":
    """Loader of the inputs to show, and what its data are called: of prediction, else of validation or training."""
    for name, data in (("predict_dataloader", "prediction data"), ("val_dataloader", "validation data")):
        if is_overridden(name, datamodule, pl.LightningDataModule):
            return single_loader(getattr(datamodule, name)(), name), data
    return single_loader(datamodule.train_dataloader(), "train_dataloader"), "training data"


def single_loader(loader: Any, name: str) -> "DataLoader[Any] | Iterable[Batch]":
    """The one loader that a method of a data module has returned.

    Raises:
        ValueError: If there are several.
    """
    if isinstance(loader, (dict, list, tuple)) and len(loader) == 1:
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
    if isinstance(loader, dict) or not isinstance(loader, Iterable) or _holds_loaders(loader):
        raise ValueError(
            f"{name} of the data module must give one data loader to explain; got {type(loader).__name__}. Write a "
            "data module with a single one."
        )
    return loader


def _holds_loaders(loader: Any) -> bool:
    return isinstance(loader, (list, tuple)) and any(isinstance(item, DataLoader) for item in loader)


def _has_length(loader: Any) -> bool:
    try:
        return math.isfinite(len(loader))
    except (TypeError, NotImplementedError):
        return False
