"""PyTorch Lightning training for prototype readout heads (DDCL-Attention).

The layer is :class:`DDCLAttention`, a plain module; :class:`DDCLReadoutModule` trains it on any backbone, and the
callbacks in ``ddcl_lightning.callbacks`` attach to any LightningModule that holds one.
"""

import ddcl_lightning._utils.checkout  # noqa: F401 - first: refuses a mixture of two copies
from ddcl_lightning.adapters.distillation import distill_feedforward, initialize_feedforward
from ddcl_lightning.adapters.feedforward import DDCLFeedForward
from ddcl_lightning.adapters.gated import GatedPrototypes
from ddcl_lightning.adapters.insertion import insert_prototypes, quantization_loss, remove_prototypes
from ddcl_lightning.adapters.norm import PrototypeNorm
from ddcl_lightning.adapters.replacement import replace_feedforward
from ddcl_lightning.adapters.serial import SerialPrototypes
from ddcl_lightning.backbones import (
    Backbone,
    ConvBackbone,
    IdentityBackbone,
    PatchBackbone,
    PCABackbone,
    TimmBackbone,
    Tokens,
    TransformersBackbone,
)
from ddcl_lightning.decoders import ConvDecoder, Decoder, SequenceDecoder
from ddcl_lightning.functional import BankOutput, Decomposition
from ddcl_lightning.heads import DDCLReadout, Head, HierarchicalReadout, ReadoutOutput
from ddcl_lightning.integrations.scikit_learn import DDCLClustering
from ddcl_lightning.metrics.clustering_metrics import ClusteringMetrics
from ddcl_lightning.metrics.codebook_metrics import CodebookMetrics
from ddcl_lightning.metrics.reconstruction_metrics import ReconstructionMetrics
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.nn.attention import DDCLAttention, DDCLAttentionOutput
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.quantizer import SoftVectorQuantizer
from ddcl_lightning.nn.scaling import EmbeddingScale
from ddcl_lightning.nn.temperature import Temperature
from ddcl_lightning.optim.token_normalized import TokenNormalized
from ddcl_lightning.optim.two_timescale import two_timescale_groups
from ddcl_lightning.tasks import Classification, ClassificationAndClustering, Clustering, Reconstruction, Task

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BankOutput",
    "Classification",
    "ClassificationAndClustering",
    "Clustering",
    "ClusteringMetrics",
    "CodebookMetrics",
    "ConvBackbone",
    "ConvDecoder",
    "DDCLAttention",
    "DDCLAttentionOutput",
    "DDCLClustering",
    "DDCLFeedForward",
    "DDCLReadout",
    "DDCLReadoutModule",
    "Decoder",
    "Decomposition",
    "EmbeddingScale",
    "GatedPrototypes",
    "Head",
    "HierarchicalReadout",
    "IdentityBackbone",
    "PCABackbone",
    "PatchBackbone",
    "PrototypeBank",
    "PrototypeNorm",
    "ReadoutOutput",
    "Reconstruction",
    "ReconstructionMetrics",
    "SequenceDecoder",
    "SerialPrototypes",
    "SoftVectorQuantizer",
    "Task",
    "Temperature",
    "TimmBackbone",
    "TokenNormalized",
    "Tokens",
    "TransformersBackbone",
    "distill_feedforward",
    "find_banks",
    "initialize_feedforward",
    "insert_prototypes",
    "quantization_loss",
    "remove_prototypes",
    "replace_feedforward",
    "two_timescale_groups",
]
