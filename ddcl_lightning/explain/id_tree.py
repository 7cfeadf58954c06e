"""The tree of semantic IDs: which items share the first codes, collected in one pass over the data."""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ddcl_lightning._utils.batch import Batch, class_labels
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.callbacks._id_table import residual_quantizer
from ddcl_lightning.explain.collection import (
    check_arguments,
    choose_inputs,
    data_name,
    input_loader,
    progress_bar,
    single_loader,
)
from ddcl_lightning.explain.explanation import ClassShare, Neighbour, Sample, WordShare
from ddcl_lightning.explain.samples import Album, positions
from ddcl_lightning.explain.statistics import TEXT_LIFT, TOP_CLASSES
from ddcl_lightning.explain.typical_words import WordMass, words_of
from ddcl_lightning.metrics.semantic_id_metrics import SemanticIDMetrics
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.nn.balanced_ids import LevelQuantizer
from ddcl_lightning.tasks.semantic_ids import SemanticIDs, item_codes

DEPTH = 2  # levels of the tree that are shown
TOP_WORDS = 8
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """The items whose IDs begin with the same codes.

    Attributes:
        codes: The codes that they share.
        items: How many they are.
        share: The same as a share of all items.
        distinct: Distinct IDs among them.
        examples: Items nearest to what the shared codes decode to.
        classes: Class composition, largest first; empty without labels.
        words: Characteristic words, most telling first; empty without texts and below the first level.
        children: Branches one level below, largest first; empty at the last one that is shown.
    """

    codes: Prefix
    items: int
    share: float
    distinct: int
    examples: list[Neighbour]
    classes: list[ClassShare] = field(default_factory=list)
    words: list[WordShare] = field(default_factory=list)
    children: list["Branch"] = field(default_factory=list)

    @property
    def dead(self) -> bool:
        """True for a code that no item has."""
        return not self.items


@dataclass(frozen=True)
class ItemView:
    """An item and its ID.

    Attributes:
        sample: The item.
        codes: Its ID.
        same: Items with this ID among those that were read.
    """

    sample: Sample
    codes: Prefix
    same: int


@dataclass(frozen=True)
class IDTree:
    """Everything in a report on semantic IDs.

    Attributes:
        data: Name of the data set.
        model: Its parts, from backbone to task.
        checkpoint: Name of the checkpoint's file, or None.
        complete: Whether all of the training data were read.
        num_codes: K.
        metrics: Those of :class:`~ddcl_lightning.SemanticIDMetrics`, over the items that were read.
        branches: The K branches of the first level, by code; those without items too.
        items: Items with their IDs, in order.
        health: What a CollapseWarning found in training, a line for each codebook; empty where none watched.
    """

    data: str
    model: list[str]
    checkpoint: str | None
    complete: bool
    num_codes: int
    metrics: dict[str, float]
    branches: list[Branch]
    items: list[ItemView]
    health: tuple[str, ...] = ()

    @property
    def num_levels(self) -> int:
        """L."""
        return sum(name.endswith("_usage") for name in self.metrics)


def collect_tree(
    module: DDCLReadoutModule,
    datamodule: pl.LightningDataModule,
    *,
    examples: int = 5,
    inputs: int = 20,
    indices: Sequence[int] | None = None,
    max_samples: int = 10_000,
    checkpoint: str | None = None,
    to_device: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
) -> IDTree:
    """Tree of the IDs of a trained module whose task is :class:`~ddcl_lightning.SemanticIDs`.

    The arguments are those of :func:`~ddcl_lightning.explain.collect`: examples are of each branch, items to show come
    from the prediction data.

    Raises:
        ValueError: As there, or if the head has no residual quantizer.
    """
    check_arguments(examples, inputs, indices, max_samples)
    quantizer = residual_quantizer(module)
    if not isinstance(module.task, SemanticIDs):
        raise ValueError(
            f"the task must be SemanticIDs for a tree of IDs; got {type(module.task).__name__}. Use collect for others."
        )
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("predict")
    album = Album(datamodule)
    move = to_device or (lambda batch: module.transfer_batch_to_device(batch, module.device, 0))
    tally = TreeTally(quantizer.num_codes, quantizer.num_codebooks, examples, album)
    with isolate_rng(), evaluating(module), torch.no_grad():
        torch.manual_seed(0)  # a loader that shuffles by the global generator
        loader = single_loader(datamodule.train_dataloader(), "train_dataloader")
        complete = _read(tally, module, quantizer, progress_bar(loader, "training data", progress), move, max_samples)
        source, _ = input_loader(datamodule)
        chosen = progress_bar(choose_inputs(source, inputs, indices, max_samples), "items", progress)
        items = []
        for place, known, batch in chosen:
            codes = tuple(item_codes(module(move(batch)))[0].tolist())
            items.append(ItemView(album.sample(batch, 0, place, known), codes, tally.counts[codes]))
    return IDTree(
        data=data_name(datamodule),
        model=[type(stage).__name__ for stage in (module.backbone, module.head, module.task)],
        checkpoint=checkpoint,
        complete=complete,
        num_codes=quantizer.num_codes,
        metrics={name: float(value) for name, value in tally.metrics.compute().items()},
        branches=tally.branches(),
        items=items,
    )


def _read(
    tally: "TreeTally",
    module: DDCLReadoutModule,
    quantizer: LevelQuantizer,
    batches: Iterable[Batch],
    move: Callable[[Batch], Batch],
    max_samples: int,
) -> bool:
    """Add batches to the tally, up to a number of items; True if those were all."""
    task = module.task
    assert isinstance(task, SemanticIDs)
    for batch in batches:
        if tally.samples >= max_samples:
            return False
        moved = move(batch)
        readout = module(moved)
        ids = item_codes(readout)
        assert readout.inputs is not None
        levels = range(1, min(DEPTH, ids.shape[1]) + 1)
        distances = [(readout.inputs[:, 0] - quantizer.decode(ids[:, :level])).norm(dim=1) for level in levels]
        decoded, target, _ = task.compared(readout, moved)
        tally.metrics.update(ids.cpu(), target.flatten(1).cpu(), decoded.flatten(1).cpu())
        tally.add(ids.cpu(), torch.stack(distances, 1).cpu(), batch)
    if not tally.samples:
        raise ValueError("the training data loader gave no batch, so there is nothing to explain. Check the data.")
    return True


class TreeTally:
    """Counts and examples of the branches of IDs; their memory grows with the distinct IDs that were read.

    Args:
        num_codes: K.
        num_levels: L.
        examples: Items kept per branch.
        album: Shows items.

    Attributes:
        samples: Items so far.
        counts: Items of each ID.
        metrics: Of the IDs so far.
    """

    def __init__(self, num_codes: int, num_levels: int, examples: int, album: Album) -> None:
        self.samples = 0
        self.counts: Counter[Prefix] = Counter()
        self.metrics = SemanticIDMetrics(num_codes, num_levels, sync_on_compute=False)
        self._num_codes, self._examples, self._album = num_codes, examples, album
        self._nearest: dict[Prefix, list[tuple[float, int, Neighbour]]] = {}
        self._classes: dict[Prefix, Counter[int]] = {}  # of the empty prefix: those of all items
        self._words = WordMass(num_codes)

    def add(self, ids: Tensor, distances: Tensor, batch: Batch) -> None:
        """Add a batch.

        Args:
            ids: ``(B, L)``.
            distances: Of each item to what the first codes of its ID decode to, ``(B, depth)``.
            batch: As the data loader yields it.
        """
        places, known = positions(batch, self.samples)
        texts = self._texts(batch, places, known)
        for row, (codes, label) in enumerate(zip(map(tuple, ids.tolist()), class_labels(batch).tolist(), strict=True)):
            self.counts[codes] += 1
            if label >= 0:
                for level in range(distances.shape[1] + 1):
                    self._classes.setdefault(codes[:level], Counter())[label] += 1
            for level, distance in enumerate(distances[row].tolist(), start=1):
                prefix = codes[:level]
                kept = self._nearest.setdefault(prefix, [])
                if len(kept) < self._examples or (distance, places[row]) < kept[-1][:2]:
                    shown = self._album.sample(batch, row, places[row], known)
                    insort(kept, (distance, places[row], Neighbour(shown, distance, 1.0)), key=lambda entry: entry[:2])
                    del kept[self._examples :]
            if texts is not None:
                words = words_of(texts[row])
                weights = np.zeros((len(words), self._num_codes))
                weights[:, codes[0]] = 1.0
                self._words.add(words, weights)
        self.samples += len(places)

    def _texts(self, batch: Batch, places: Sequence[int], known: bool) -> list[str] | None:
        """Texts of the items, or what a data module of vectors knows of them; None of images."""
        if isinstance(batch, dict) and "text" in batch:
            return [str(text) for text in batch["text"]]
        shown = [self._album.sample(batch, 0, places[0], known).content] if known else []
        if not shown or not isinstance(shown[0], str):
            return None
        return [str(self._album.sample(batch, row, place, known).content) for row, place in enumerate(places)]

    def branches(self) -> list[Branch]:
        """The branches of the first level, by code."""
        items: Counter[Prefix] = Counter()
        distinct: Counter[Prefix] = Counter()
        for codes, count in self.counts.items():
            for level in range(1, DEPTH + 1):
                items[codes[:level]] += count
                distinct[codes[:level]] += 1
        below: dict[Prefix, list[Branch]] = {}
        for prefix in sorted(self._nearest, key=lambda prefix: (-len(prefix), -items[prefix], prefix)):
            branch = self._branch(prefix, items[prefix], distinct[prefix], below.get(prefix, []))
            below.setdefault(prefix[:-1], []).append(branch)
        used = {branch.codes[0]: branch for branch in below.get((), [])}
        return [used.get(code) or Branch((code,), 0, 0.0, 0, []) for code in range(self._num_codes)]

    def _branch(self, prefix: Prefix, items: int, distinct: int, children: list[Branch]) -> Branch:
        return Branch(
            codes=prefix,
            items=items,
            share=items / self.samples,
            distinct=distinct,
            examples=[neighbour for _, _, neighbour in self._nearest[prefix]],
            classes=self._class_shares(prefix),
            words=self._words.top(prefix[0], TOP_WORDS, TEXT_LIFT) if len(prefix) == 1 else [],
            children=children,
        )

    def _class_shares(self, prefix: Prefix) -> list[ClassShare]:
        counts, base = self._classes.get(prefix, Counter()), self._classes.get((), Counter())
        order = sorted(counts, key=lambda label: (-counts[label], label))[:TOP_CLASSES]
        return [
            ClassShare(
                self._album.class_name(label) or str(label),
                counts[label] / counts.total(),
                base[label] / base.total(),
            )
            for label in order
        ]
