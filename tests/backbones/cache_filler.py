"""A pretrained backbone without a model, and a process that fills its cache and waits to be killed on the way."""

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ddcl_lightning._utils.batch import texts
from ddcl_lightning.backbones import Tokens, feature_cache
from ddcl_lightning.backbones.pretrained import PretrainedBackbone


class Letters(PretrainedBackbone):
    """One token per letter; ``encoded`` lists the texts that went through the encoder, in order."""

    ragged = True
    _pool_batches = 4

    def __init__(self, cache_dir: str | None = None, cache_dtype: Any = "float16", **kwargs: Any) -> None:
        super().__init__(kwargs.get("unfreeze", 0), False, cache_dir, cache_dtype, kwargs.get("cache_gb"))
        self.encoder: nn.Module = nn.Embedding(128, 4)
        self.encoder.weight.data = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
        self.embed_dim = 4
        self.encoded: list[str] = []
        self._set_trainable(None, lambda: self.encoder(torch.zeros(1, 2, dtype=torch.int64)))

    def samples(self, batch: Any) -> Sequence[str]:
        return texts(batch)

    def keys(self, samples: Any) -> list[bytes]:
        return [feature_cache.content_key(sample.encode()) for sample in samples]

    def encode(self, samples: Any) -> Tokens:
        self.encoded += samples
        letters: list[Tensor] = [torch.tensor([ord(letter) for letter in text]) for text in samples]
        lengths = torch.tensor([len(text) for text in samples])
        ids = pad_sequence(letters, batch_first=True)
        return Tokens(self.encoder(ids), torch.arange(ids.shape[1]) < lengths[:, None])

    def recipe(self) -> dict[str, Any]:
        return {"alphabet": "ascii"}


def text(number: int) -> str:
    """A text of its own, of 1 to 9 letters and its number."""
    return "abcdefghi"[: 1 + number % 9] + str(number)


def batches(first: int, last: int, size: int = 4) -> list[dict[str, list[str]]]:
    return [{"text": [text(i) for i in range(start, min(start + size, last))]} for start in range(first, last, size)]


def fill(cache_dir: str, first: int, last: int, hang_in: str, connection: Connection) -> None:
    """Fill a cache when told to; ``hang_in`` is ``"hang_in_encoder"``, ``"hang_in_write"`` or nothing."""

    def hang() -> None:
        connection.send("ready to be killed")
        time.sleep(600)

    feature_cache.SEGMENT_SAMPLES = 6
    backbone = Letters(cache_dir)
    if hang_in == "hang_in_encoder":
        encode = backbone.encode
        backbone.encode = lambda samples: hang() if len(backbone.encoded) >= 20 else encode(samples)  # type: ignore
    if hang_in == "hang_in_write":
        write = feature_cache._write

        def write_half(path: Any, save: Any) -> None:
            write(path, save)
            if path.name == "index.npz" and len(list(path.parents[1].glob("segment-*"))) == 2:
                path.write_bytes(path.read_bytes()[:-20])  # before the folder gets its name
                hang()

        feature_cache._write = write_half
    connection.send("ready")
    connection.recv()
    backbone.fill_cache(batches(first, last), progress=False)
