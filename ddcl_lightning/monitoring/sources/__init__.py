"""Codebooks of ours and of others: how each kind is recognised, and how a call of it becomes a record."""

from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.codec_codebooks import DirectionCodebook, EuclideanCodebook
from ddcl_lightning.monitoring.sources.finding import find_codebooks
from ddcl_lightning.monitoring.sources.gumbel_quantizers import GumbelQuantizer
from ddcl_lightning.monitoring.sources.image_quantizers import ImageQuantizer
from ddcl_lightning.monitoring.sources.implicit_codebooks import ImplicitCodebook
from ddcl_lightning.monitoring.sources.library_codebooks import LibraryCodebook, LibrarySimVQ
from ddcl_lightning.monitoring.sources.linear_prototypes import LinearPrototypes
from ddcl_lightning.monitoring.sources.named_codebooks import EmbeddingCodebook, ReadCodebook
from ddcl_lightning.monitoring.sources.observed_calls import Call
from ddcl_lightning.monitoring.sources.own_quantizers import OwnQuantizer

__all__ = [
    "Call",
    "CodebookSource",
    "DirectionCodebook",
    "EmbeddingCodebook",
    "EuclideanCodebook",
    "GumbelQuantizer",
    "ImageQuantizer",
    "ImplicitCodebook",
    "LibraryCodebook",
    "LibrarySimVQ",
    "LinearPrototypes",
    "OwnQuantizer",
    "ReadCodebook",
    "find_codebooks",
]
