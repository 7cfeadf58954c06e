"""Prototypes inside existing networks: inserted after, beside or in the place of its blocks, and distilled."""

from ddcl_lightning.adapters.base import PrototypeAdapter
from ddcl_lightning.adapters.distillation import Distilled, distill_feedforward, initialize_feedforward
from ddcl_lightning.adapters.feedforward import DDCLFeedForward
from ddcl_lightning.adapters.gated import GatedPrototypes
from ddcl_lightning.adapters.insertion import insert_prototypes, quantization_loss, remove_prototypes
from ddcl_lightning.adapters.norm import PrototypeNorm
from ddcl_lightning.adapters.replacement import FeedForwardReplacement, replace_feedforward
from ddcl_lightning.adapters.serial import SerialPrototypes

__all__ = [
    "DDCLFeedForward",
    "Distilled",
    "FeedForwardReplacement",
    "GatedPrototypes",
    "PrototypeAdapter",
    "PrototypeNorm",
    "SerialPrototypes",
    "distill_feedforward",
    "initialize_feedforward",
    "insert_prototypes",
    "quantization_loss",
    "remove_prototypes",
    "replace_feedforward",
]
