"""Plain modules without Lightning: the bank of prototypes and what is built on it."""

from ddcl_lightning.nn.attention import DDCLAttention, DDCLAttentionOutput
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.quantizer import QuantizerOutput, QuantizerTerms, SoftVectorQuantizer
from ddcl_lightning.nn.scaling import EmbeddingScale
from ddcl_lightning.nn.temperature import Temperature

__all__ = [
    "DDCLAttention",
    "DDCLAttentionOutput",
    "EmbeddingScale",
    "PrototypeBank",
    "QuantizerOutput",
    "QuantizerTerms",
    "SoftVectorQuantizer",
    "Temperature",
    "find_banks",
]
