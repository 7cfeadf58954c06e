"""Plain modules without Lightning: the bank of prototypes and what is built on it."""

from ddcl_lightning.nn.attention import DDCLAttention, DDCLAttentionOutput
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.moving_bank import CodeUpdate
from ddcl_lightning.nn.quantizer import SoftVectorQuantizer
from ddcl_lightning.nn.quantizer_base import Quantizer, QuantizerOutput, QuantizerTerms
from ddcl_lightning.nn.residual_quantizer import ResidualVectorQuantizer
from ddcl_lightning.nn.scaling import EmbeddingScale
from ddcl_lightning.nn.temperature import Temperature
from ddcl_lightning.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "CodeUpdate",
    "DDCLAttention",
    "DDCLAttentionOutput",
    "EmbeddingScale",
    "PrototypeBank",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerTerms",
    "ResidualVectorQuantizer",
    "SoftVectorQuantizer",
    "Temperature",
    "VectorQuantizer",
    "find_banks",
]
