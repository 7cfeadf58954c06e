"""Texts as vectors without a pretrained model: latent semantic analysis."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.nn.functional import normalize as to_unit_length

from ddcl_lightning._utils.arguments import require_at_least, typed
from ddcl_lightning._utils.batch import Batch, texts
from ddcl_lightning._utils.distributed import gather_objects, world_size
from ddcl_lightning.backbones.base import Backbone, Tokens, count_batches
from ddcl_lightning.nn.guarded_state import FINITE, FLAG, NOT_NEGATIVE, GuardedState, Rules

FIT_TEXTS = 20_000  # texts from which the components are taken; the idf is of all of them
FEW_TEXTS = 1000  # below which words of one text are kept too


class LSABackbone(GuardedState, Backbone):
    """One vector per text by latent semantic analysis: its words, on the main components of the training texts.

    Words count by their logarithm and the square of their inverse document frequency (idf), which leaves little of
    those that are everywhere. It needs no model and no network, and knows nothing but which words occur together: no
    synonyms that the texts do not show, no order of words, and no language without spaces. Texts about different
    subjects come apart, texts that say the same in other words do not; a pretrained encoder
    (:class:`~ddcl_lightning.backbones.TransformersBackbone`) knows more of a language.

    Words are hashed into ``num_buckets``, so there is no vocabulary that grows with the data. Vectors have unit length,
    so that distances are those of the cosine; a text without any known word is the zero vector.

    Args:
        num_components: D, also ``embed_dim``; components beyond those that the texts have come out as zero.
        num_buckets: Hashed words, at least 2; different words share one where there are more.

    Attributes:
        fitted: Buffer, 1 after the fit and 0 before, saved with the state: a resumed run is not fitted again.
        word_weights: Buffer ``(num_buckets,)``, squared idf of each word; 0 for those of one text among many.
        components: Buffer ``(num_buckets, num_components)``.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If run before the fit.
    """

    fitted: Tensor
    word_weights: Tensor
    components: Tensor
    state_rules: ClassVar[Rules] = {"fitted": FLAG, "word_weights": NOT_NEGATIVE, "components": FINITE}

    @typed
    def __init__(self, num_components: int = 64, num_buckets: int = 2**15) -> None:
        super().__init__()
        require_at_least(1, num_components=num_components)
        require_at_least(2, num_buckets=num_buckets)
        self.num_components = self.embed_dim = num_components
        self.num_buckets = num_buckets
        self.register_buffer("fitted", torch.zeros(()))
        self.register_buffer("word_weights", torch.zeros(num_buckets))
        self.register_buffer("components", torch.zeros(num_buckets, num_components))
        self._hash = HashingVectorizer(n_features=num_buckets, alternate_sign=False, norm=None, dtype=np.float32)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Fit to the training texts, once and for all; of a stream without end to as many as are sampled."""
        if bool(self.fitted):
            return
        endless = count_batches(batches) is None
        sample = _TextSample(max(1, FIT_TEXTS // world_size()), self.num_buckets)
        for batch in batches:
            sample.add(self._counts(texts(batch)))
            if endless and sample.num_texts >= sample.capacity:
                break
        gathered = gather_objects((sample.num_texts, sample.frequencies, sample.rows))
        rows = [row for _, _, rows_of_process in gathered for row in rows_of_process]
        self._fit(sum(number for number, _, _ in gathered), sum(counts for _, counts, _ in gathered), rows)

    def fit(self, sample: Sequence[str]) -> None:
        """Set idf and components from texts.

        Raises:
            ValueError: If no word tells one from another.
        """
        counts = self._counts(list(sample))
        self._fit(counts.shape[0], np.bincount(counts.indices, minlength=self.num_buckets), list(counts))

    def forward(self, batch: Batch) -> Tokens:
        """Vectors ``(B, 1, num_components)`` of the batch's texts, of unit length."""
        if not bool(self.fitted):
            raise RuntimeError(
                "LSABackbone is not fitted. Trainer.fit does it on the training data; outside of it call "
                "backbone.fit(texts) with a sample of texts, or load a checkpoint."
            )
        counts = self._counts(texts(batch))
        device = self.components.device
        words = torch.from_numpy(counts.indices.astype(np.int64)).to(device)
        starts = torch.from_numpy(counts.indptr[:-1].astype(np.int64)).to(device)
        weights = torch.from_numpy(counts.data).to(device) * self.word_weights[words]
        sums = embedding_bag(words, self.components, starts, mode="sum", per_sample_weights=weights)
        return Tokens(to_unit_length(sums, dim=-1, eps=1e-6).unsqueeze(1))

    def _counts(self, batch_texts: list[str]) -> csr_matrix:
        """Words of texts ``(B, num_buckets)``, each by 1 + ln of its count."""
        counts: csr_matrix = csr_matrix(self._hash.transform(batch_texts))
        counts.data = 1 + np.log(counts.data)
        return counts

    @torch.no_grad()
    def _fit(self, num_texts: int, frequencies: Any, rows: list[csr_matrix]) -> None:
        idf = np.log((1 + num_texts) / (1 + frequencies))
        idf[frequencies < (2 if num_texts >= FEW_TEXTS else 1)] = 0
        # Ordered by content, so that every process gets the same components.
        ordered = sorted(rows, key=lambda row: (row.nnz, row.indices.tobytes(), row.data.tobytes()))
        counts = vstack(ordered).tocsr() if ordered else csr_matrix((0, self.num_buckets))
        weighted = normalize(counts.multiply(idf**2).tocsr())
        if not weighted.nnz or not weighted.data.any():
            raise ValueError(
                f"texts must differ in their words to fit LSABackbone; {num_texts} texts have no word that some have "
                "and others have not. Check the column of the texts, or give a pretrained encoder."
            )
        size = min(self.num_components, *weighted.shape)
        components = TruncatedSVD(size, random_state=0).fit(weighted).components_.T
        self.components.zero_()
        self.components[:, : components.shape[1]] = torch.from_numpy(np.ascontiguousarray(components))
        self.word_weights.copy_(torch.from_numpy(idf**2))
        self.fitted.fill_(1.0)

    def extra_repr(self) -> str:
        """Sizes and whether it is fitted, for ``print``."""
        state = "fitted" if bool(self.fitted) else "not fitted yet"
        return f"num_components={self.num_components}, num_buckets={self.num_buckets}; {state}"


class _TextSample:
    """Uniform sample of rows of word counts (Vitter's algorithm R), and in how many texts each word is, of all."""

    def __init__(self, capacity: int, num_buckets: int) -> None:
        self.capacity, self.num_texts = capacity, 0
        self.frequencies = np.zeros(num_buckets, np.int64)
        self.rows: list[csr_matrix] = []
        self._generator = np.random.default_rng(0)

    def add(self, counts: csr_matrix) -> None:
        self.frequencies += np.bincount(counts.indices, minlength=len(self.frequencies))
        for row in counts:
            self.num_texts += 1
            if len(self.rows) < self.capacity:
                self.rows.append(row)
            elif (place := int(self._generator.integers(self.num_texts))) < self.capacity:
                self.rows[place] = row
