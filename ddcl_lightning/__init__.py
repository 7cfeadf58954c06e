"""PyTorch Lightning training for prototype readout heads (DDCL-Attention).

The layer is :class:`DDCLAttention`, a plain module; :class:`DDCLReadoutModule` trains it on any backbone, and the
callbacks in ``ddcl_lightning.callbacks`` attach to any LightningModule that holds one.
"""

from ddcl_lightning.attention import DDCLAttention, DDCLAttentionOutput
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
from ddcl_lightning.bank import PrototypeBank
from ddcl_lightning.codebook_metrics import CodebookMetrics
from ddcl_lightning.decoders import ConvDecoder, Decoder, SequenceDecoder
from ddcl_lightning.estimator import DDCLClustering
from ddcl_lightning.feedforward import DDCLFeedForward
from ddcl_lightning.functional import BankOutput, Decomposition
from ddcl_lightning.heads import DDCLReadout, Head, HierarchicalReadout, ReadoutOutput
from ddcl_lightning.metrics import ClusteringMetrics
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.optim import TokenNormalized
from ddcl_lightning.placement import (
    GatedPrototypes,
    PrototypeNorm,
    SerialPrototypes,
    insert_prototypes,
    quantization_loss,
    remove_prototypes,
)
from ddcl_lightning.probe import find_banks
from ddcl_lightning.quantizer import SoftVectorQuantizer
from ddcl_lightning.rates import two_timescale_groups
from ddcl_lightning.reconstruction_metrics import ReconstructionMetrics
from ddcl_lightning.replacement import distill_feedforward, initialize_feedforward, replace_feedforward
from ddcl_lightning.scale import EmbeddingScale
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
