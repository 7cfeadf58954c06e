"""What pretrained encoders have in common: freezing in whole or in part, and tokens kept on disk while frozen."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm.auto import tqdm

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.distributed import gather_objects, is_first_process, world_size
from ddcl_lightning.backbones.base import Backbone, Tokens, count_batches
from ddcl_lightning.backbones.feature_cache import SEGMENT_SAMPLES, CacheDtype, FeatureCache, Rows, weights_fingerprint

Unfreeze = int | Literal["all"]
Samples = Sequence[Any] | Tensor  # whatever has a place for each sample


class PretrainedBackbone(Backbone):
    """A pretrained encoder that is frozen, or trains in its last blocks or as a whole.

    A frozen encoder runs in evaluation mode, whatever mode the module is in, and without gradients. Its tokens are
    always the same for the same sample, so with ``cache_dir`` each sample is encoded once, and never again by any run
    that has the same encoder: before training for the training data, when they first come for others. Cached
    tokens are computed in full precision, even under autocast, then rounded to ``cache_dtype``; the
    first epoch sees the rounded ones too.

    Subclasses load ``encoder``, call ``_set_trainable`` once and write ``samples``, ``keys``, ``encode`` and
    ``recipe``.

    Args:
        unfreeze: 0 keeps the encoder frozen, n trains its last n blocks with what follows them, ``"all"`` everything.
        gradient_checkpointing: Whether the encoder computes activations twice to keep fewer of them.
        cache_dir: Folder where tokens of a frozen encoder are kept; None computes them in every epoch.
        cache_dtype: Of the tokens there.
        cache_gb: Most that the cache may take on disk, in GiB, > 0; None allows half of what is free. Before it is
            filled a line says what the training data will take; what does not fit is encoded in every epoch.

    Attributes:
        encoder: The pretrained model.
        ragged: Whether samples differ in their number of tokens.

    Raises:
        ValueError: If an argument is out of its range, or needs a frozen encoder (cache) or a trained one (gradient
            checkpointing).
    """

    encoder: nn.Module
    ragged: bool = False
    _pool_batches = 1  # batches from which a fill gathers samples, to encode those of equal length together

    @typed
    def __init__(
        self,
        unfreeze: Unfreeze,
        gradient_checkpointing: bool,
        cache_dir: str | None,
        cache_dtype: CacheDtype,
        cache_gb: float | None = None,
    ) -> None:
        super().__init__()
        if unfreeze != "all" and (not isinstance(unfreeze, int) or isinstance(unfreeze, bool) or unfreeze < 0):
            raise ValueError(f"unfreeze must be a number of blocks >= 0, or 'all'; got {unfreeze!r}. Pass 0 or more.")
        if gradient_checkpointing and unfreeze == 0:
            raise ValueError(
                "gradient_checkpointing saves memory for gradients, of which a frozen encoder has none; leave it "
                "out, or set unfreeze."
            )
        if cache_dir is not None and unfreeze != 0:
            raise ValueError(
                f"cache_dir needs a frozen encoder: with unfreeze={unfreeze!r} its tokens change at every step. Leave "
                "it out, or set unfreeze=0."
            )
        if cache_dtype not in get_args(CacheDtype):
            raise ValueError(
                f"cache_dtype must be one of {get_args(CacheDtype)}; got {cache_dtype!r}. Choose one of them."
            )
        if cache_gb is not None and not cache_gb > 0:
            raise ValueError(f"cache_gb must be > 0; got {cache_gb}. Leave out cache_dir to keep nothing.")
        self.cache_gb = cache_gb
        self.unfreeze, self.gradient_checkpointing = unfreeze, gradient_checkpointing
        self.cache_dir, self.cache_dtype = cache_dir, cache_dtype
        self._cache: FeatureCache | None = None
        self._filled = self._warned = False
        self._looked_up = self._missed = 0
        self.register_load_state_dict_post_hook(_close_cache)  # type: ignore[no-untyped-call]

    # What subclasses write -----------------------------------------------------------------------

    @abstractmethod
    def samples(self, batch: Batch) -> Samples:
        """The B samples of a batch, each with a length by which it can be sorted."""

    @abstractmethod
    def keys(self, samples: Samples) -> list[bytes]:
        """A :func:`~ddcl_lightning.backbones.feature_cache.content_key` for each sample."""

    @abstractmethod
    def encode(self, samples: Samples) -> Tokens:
        """Tokens ``(B, T, embed_dim)`` of samples on the encoder's device, valid ones first."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Settings that decide the tokens of a sample, other than the weights, as plain data."""

    # Freezing ------------------------------------------------------------------------------------

    def _set_trainable(self, blocks: Sequence[Sequence[nn.Parameter]] | None, forward: Callable[[], Tensor]) -> None:
        """Let gradients reach what ``unfreeze`` names.

        Args:
            blocks: Parameters of each block, from the input to the output, or None where the model has none.
            forward: Runs the encoder on the smallest input and returns its tokens.
        """
        self.encoder.requires_grad_(False)
        if self.unfreeze == 0:
            return
        # What the tokens do not depend on (an unused head) would get no gradient, for which DDP waits for ever.
        used = gradient_reaches(forward, self.encoder.requires_grad_(True))
        self.encoder.requires_grad_(False)
        if self.unfreeze != "all":
            if blocks is None:
                raise ValueError(
                    f"unfreeze={self.unfreeze} needs a model with a list of blocks, which "
                    f"{type(self.encoder).__name__} has not; use 0 or 'all'."
                )
            ids = {id(parameter) for parameter in used}
            blocks = [[parameter for parameter in block if id(parameter) in ids] for block in blocks]
            blocks = [block for block in blocks if block]
            if self.unfreeze > len(blocks):
                raise ValueError(
                    f"unfreeze must be at most the {len(blocks)} blocks that are used, or 'all'; got {self.unfreeze}. "
                    "Lower it, or pass 'all'."
                )
            used = [parameter for block in blocks[-self.unfreeze :] for parameter in block]
        for parameter in used:
            parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> "PretrainedBackbone":
        """Set the mode; frozen parts stay in evaluation mode, with neither dropout nor new batch statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    # Tokens --------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, embed_dim)`` of a batch, from the cache where there is one and it has them."""
        samples = self.samples(batch)
        if self.cache_dir is not None:
            return self._recall(samples, self._open_cache())
        # Not only what ``unfreeze`` names: a fine-tuning callback lets an encoder train that was frozen at first.
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return self.encode(samples)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Encode the training data that the cache does not hold yet; a stream without end is left as it is."""
        if self.cache_dir is not None and count_batches(batches) is not None:
            _close_cache(self)  # weights may have changed since it was opened
            self.fill_cache(batches)
            gather_objects(None)  # every process has written its part
            self._open_cache().rescan()
            self._filled = True

    def fill_cache(self, batches: Iterable[Batch], progress: bool = True) -> int:
        """Encode the samples that the cache does not hold yet; an interrupted fill goes on where it stopped.

        Args:
            batches: As ``forward`` gets them.
            progress: Show a bar over batches on the first process.

        Returns:
            Number of samples encoded.

        Raises:
            ValueError: If there is no ``cache_dir``.
        """
        if self.cache_dir is None:
            raise ValueError("fill_cache needs a place to keep tokens; give the backbone a cache_dir.")
        cache, encoded, size = self._open_cache(), 0, 1
        announced, pool = False, dict[bytes, Any]()
        silent = not (progress and is_first_process())
        shown = tqdm(batches, desc="tokens to cache", total=count_batches(batches), disable=silent, leave=False)
        try:
            for batch in shown:
                samples = self.samples(batch)
                size = max(size, len(samples))
                pool.update((k, s) for k, s in zip(self.keys(samples), samples, strict=True) if k not in cache)
                if len(pool) >= size * self._pool_batches:
                    encoded += self._encode_pool(pool, size, cache)
                    if not announced:
                        self._announce(cache, encoded, size, count_batches(batches))
                        announced = True
                if not cache.writable:
                    break
            return encoded + self._encode_pool(pool, size, cache)
        finally:
            cache.flush()  # all of it is whole, after an interruption too

    def _announce(self, cache: FeatureCache, encoded: int, size: int, batches: int | None) -> None:
        """Say what all samples will take on disk, by those that were encoded first."""
        if batches is None or not cache.writable:
            return
        samples = batches * size * world_size()
        total, limit = cache.added_bytes / encoded * samples / 2**30, cache.max_bytes / 2**30
        kept = f": about {limit / total:.0%} of them are kept, the others encoded in every epoch"
        rank_zero_info(
            f"Tokens of {samples:,} samples take about {total:.3g} GiB in {cache.path}, which may hold {limit:.3g} GiB"
            f"{kept if total > limit else ''}."
        )

    def _encode_pool(self, pool: dict[bytes, Any], size: int, cache: FeatureCache) -> int:
        """Encode and empty a pool, samples of similar length together, the longest first."""
        waiting = sorted(pool.items(), key=lambda item: len(item[1]), reverse=True)
        pool.clear()
        for start in range(0, len(waiting), size):
            if cache.writable:
                keys, samples = zip(*waiting[start : start + size], strict=True)
                self._encode_and_keep(keys, samples, cache)
        return len(waiting)

    def _encode_and_keep(self, keys: Sequence[bytes], samples: Samples, cache: FeatureCache) -> list[Rows]:
        # In full precision, so that what is kept does not depend on who came first: a fill or a training step.
        with torch.no_grad(), torch.autocast(self._like().device.type, enabled=False):
            values, mask = self.encode(samples)
        lengths = [values.shape[1]] * len(keys) if mask is None else mask.sum(1).tolist()
        rows = values.float().cpu().numpy()
        return [cache.add(key, row[:length]) for key, row, length in zip(keys, rows, lengths, strict=True)]

    def _recall(self, samples: Samples, cache: FeatureCache) -> Tokens:
        keys = self.keys(samples)
        cached = {key: cache.get(key) for key in keys}
        missing = [key for key, rows in cached.items() if rows is None]
        if missing:
            places = {key: place for place, key in enumerate(keys)}
            cached.update(
                zip(missing, self._encode_and_keep(missing, [samples[places[k]] for k in missing], cache), strict=True)
            )
        if cache.writable:
            self._warn_of_new_samples(len(keys), len(missing))
        rows = [rows for rows in (cached[key] for key in keys) if rows is not None]
        lengths = np.array([len(row) for row in rows])
        values = np.zeros((len(rows), int(lengths.max()), self.embed_dim), cache.dtype)
        for place, row in enumerate(rows):
            values[place, : len(row)] = row
        like = self._like()
        mask = torch.from_numpy(np.arange(values.shape[1]) < lengths[:, None]).to(like.device) if self.ragged else None
        return Tokens(torch.from_numpy(values).to(like.device, like.dtype), mask)

    def _warn_of_new_samples(self, samples: int, missed: int) -> None:
        """Warn once if training brings samples which a pass over the training data did not."""
        if not (self.training and self._filled) or self._warned:
            return
        self._looked_up, self._missed = self._looked_up + samples, self._missed + missed
        if self._missed > SEGMENT_SAMPLES and 2 * self._missed > self._looked_up:
            self._warned = True
            warnings.warn(
                f"{self._missed} of {self._looked_up} training samples were not in the cache, although it was filled "
                "before training: random augmentation makes every sample a new one, and the cache grows without use. "
                "Leave out cache_dir, or the augmentation.",
                stacklevel=2,
            )

    def _open_cache(self) -> FeatureCache:
        if self._cache is None:
            assert self.cache_dir is not None
            recipe = {**self.recipe(), "backbone": type(self).__name__, "weights": weights_fingerprint(self.encoder)}
            limit = None if self.cache_gb is None else int(self.cache_gb * 2**30)
            self._cache = FeatureCache(self.cache_dir, recipe, self.embed_dim, self.cache_dtype, limit)
        return self._cache

    def _like(self) -> Tensor:
        """A parameter, for the device and dtype of the encoder."""
        return next(self.encoder.parameters())

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process opens the cache for itself.
        return {**self.__dict__, "_cache": None}


def gradient_reaches(run: Callable[[], Tensor], module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of a module on which the tensor that ``run`` returns depends."""
    with torch.enable_grad():
        output = run()
    candidates = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not output.requires_grad:
        return []
    gradients = torch.autograd.grad(output.float().sum(), candidates, allow_unused=True)
    return [parameter for parameter, gradient in zip(candidates, gradients, strict=True) if gradient is not None]


def _close_cache(backbone: nn.Module, _: object = None) -> None:
    """Close a cache that belongs to other weights."""
    assert isinstance(backbone, PretrainedBackbone)
    if backbone._cache is not None:
        backbone._cache.flush()
    backbone._cache = None
