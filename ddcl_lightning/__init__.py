"""PyTorch Lightning training for prototype readout heads (DDCL-Attention).

Everything that most users need comes from here, by what it is for:

- the LightningModule :class:`DDCLReadoutModule`, and what plugs into it: backbones, heads, decoders, tasks;
- plain layers for a network of your own: :class:`DDCLAttention`, :class:`SoftVectorQuantizer`,
  :class:`PrototypeBank`, :class:`Temperature`, and adapters that put prototypes into somebody else's network;
- callbacks for any LightningModule that holds a prototype bank, and data modules;
- stepping (:class:`TokenNormalized`, :func:`two_timescale_groups`), metrics, and :class:`DDCLClustering` for
  scikit-learn.

The formulas as pure functions are in ``ddcl_lightning.functional``; classes that need a library of their own are in
``ddcl_lightning.integrations``.
"""

import ddcl_lightning._utils.at_start  # before the seconds that torch and Lightning take to import
import ddcl_lightning._utils.checkout  # noqa: F401 - before the rest: refuses a mixture of two copies
from ddcl_lightning._utils.old_names import refuse_old_names
from ddcl_lightning.adapters import (
    DDCLFeedForward,
    GatedPrototypes,
    PrototypeAdapter,
    PrototypeNorm,
    SerialPrototypes,
    distill_feedforward,
    initialize_feedforward,
    insert_prototypes,
    quantization_loss,
    remove_prototypes,
    replace_feedforward,
)
from ddcl_lightning.backbones import (
    Backbone,
    ConvBackbone,
    IdentityBackbone,
    PatchBackbone,
    PCABackbone,
    PretrainedBackbone,
    TimmBackbone,
    Tokens,
    TransformersBackbone,
    input_sample,
)
from ddcl_lightning.callbacks import (
    AdaptiveBankSize,
    AssignmentWriter,
    BankCallback,
    CollapseError,
    CollapseWarning,
    DecompositionCheck,
    DecompositionViolationError,
    ExactResume,
    FitSummary,
    KMeansInitialization,
    LevelFigures,
    PrototypeFigures,
    RatioGuard,
    ReconstructionFigures,
    SaveOnSignal,
    TemperatureAnnealing,
)
from ddcl_lightning.datamodules import (
    CIFAR10DataModule,
    DebrisDataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    IMDBDataModule,
    MNISTDataModule,
    NamedTextDataModule,
    NewsgroupsDataModule,
    SplitDataModule,
    SST2DataModule,
    TensorDataModule,
    TextDataModule,
    TorchvisionDataModule,
)
from ddcl_lightning.decoders import ConvDecoder, Decoder, SequenceDecoder
from ddcl_lightning.functional import BankOutput, Decomposition
from ddcl_lightning.heads import (
    AttentionPooling,
    CLSPooling,
    CodebookHead,
    DDCLReadout,
    Head,
    HierarchicalReadout,
    MaxPooling,
    MeanPooling,
    PerceiverPooling,
    PMAPooling,
    PoolingHead,
    QuantizerReadout,
    ReadoutOutput,
    SlotAttentionPooling,
    SoftVQ,
    VQPooling,
)
from ddcl_lightning.integrations.scikit_learn import DDCLClustering
from ddcl_lightning.metrics import ClusteringMetrics, CodebookMetrics, ReconstructionMetrics
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.monitoring import CodebookRecord, Signal, record_codebooks
from ddcl_lightning.nn import (
    DDCLAttention,
    DDCLAttentionOutput,
    EmbeddingScale,
    PrototypeBank,
    Quantizer,
    QuantizerOutput,
    SoftVectorQuantizer,
    Temperature,
    VectorQuantizer,
    find_banks,
)
from ddcl_lightning.optim import LRSchedule, OptimizerConfig, SizeRules, TokenNormalized, two_timescale_groups
from ddcl_lightning.tasks import Classification, ClassificationAndClustering, Clustering, Reconstruction, Task
from ddcl_lightning.tasks.readout_module import ReadoutModule

__version__ = "0.2.0"

__all__ = [
    "AdaptiveBankSize",
    "AssignmentWriter",
    "AttentionPooling",
    "Backbone",
    "BankCallback",
    "BankOutput",
    "CIFAR10DataModule",
    "CLSPooling",
    "Classification",
    "ClassificationAndClustering",
    "Clustering",
    "ClusteringMetrics",
    "CodebookHead",
    "CodebookMetrics",
    "CodebookRecord",
    "CollapseError",
    "CollapseWarning",
    "ConvBackbone",
    "ConvDecoder",
    "DDCLAttention",
    "DDCLAttentionOutput",
    "DDCLClustering",
    "DDCLFeedForward",
    "DDCLReadout",
    "DDCLReadoutModule",
    "DebrisDataModule",
    "Decoder",
    "Decomposition",
    "DecompositionCheck",
    "DecompositionViolationError",
    "DigitsDataModule",
    "EmbeddingScale",
    "ExactResume",
    "FashionMNISTDataModule",
    "FitSummary",
    "GatedPrototypes",
    "Head",
    "HierarchicalReadout",
    "IMDBDataModule",
    "IdentityBackbone",
    "ImageDataModule",
    "ImageFolderDataModule",
    "KMeansInitialization",
    "LRSchedule",
    "LevelFigures",
    "MNISTDataModule",
    "MaxPooling",
    "MeanPooling",
    "NamedTextDataModule",
    "NewsgroupsDataModule",
    "OptimizerConfig",
    "PCABackbone",
    "PMAPooling",
    "PatchBackbone",
    "PerceiverPooling",
    "PoolingHead",
    "PretrainedBackbone",
    "PrototypeAdapter",
    "PrototypeBank",
    "PrototypeFigures",
    "PrototypeNorm",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerReadout",
    "RatioGuard",
    "ReadoutModule",
    "ReadoutOutput",
    "Reconstruction",
    "ReconstructionFigures",
    "ReconstructionMetrics",
    "SST2DataModule",
    "SaveOnSignal",
    "SequenceDecoder",
    "SerialPrototypes",
    "Signal",
    "SizeRules",
    "SlotAttentionPooling",
    "SoftVQ",
    "SoftVectorQuantizer",
    "SplitDataModule",
    "Task",
    "Temperature",
    "TemperatureAnnealing",
    "TensorDataModule",
    "TextDataModule",
    "TimmBackbone",
    "TokenNormalized",
    "Tokens",
    "TorchvisionDataModule",
    "TransformersBackbone",
    "VQPooling",
    "VectorQuantizer",
    "distill_feedforward",
    "find_banks",
    "initialize_feedforward",
    "input_sample",
    "insert_prototypes",
    "quantization_loss",
    "record_codebooks",
    "remove_prototypes",
    "replace_feedforward",
    "two_timescale_groups",
]

refuse_old_names()
