"""Heads: from tokens to a readout."""

from ddcl_lightning.heads.attention_pooling import AttentionPooling
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.heads.ddcl import DDCLReadout
from ddcl_lightning.heads.hierarchical import HierarchicalReadout
from ddcl_lightning.heads.perceiver import PerceiverPooling
from ddcl_lightning.heads.pma import PMAPooling
from ddcl_lightning.heads.pooling import CLSPooling, MaxPooling, MeanPooling, PoolingHead
from ddcl_lightning.heads.quantizer_readout import CodebookHead, QuantizerReadout
from ddcl_lightning.heads.residual_vq import ResidualVQ
from ddcl_lightning.heads.slot_attention import SlotAttentionPooling
from ddcl_lightning.heads.soft_vq import SoftVQ
from ddcl_lightning.heads.vq import VQPooling

__all__ = [
    "AttentionPooling",
    "CLSPooling",
    "CodebookHead",
    "DDCLReadout",
    "Head",
    "HierarchicalReadout",
    "MaxPooling",
    "MeanPooling",
    "PMAPooling",
    "PerceiverPooling",
    "PoolingHead",
    "QuantizerReadout",
    "ReadoutOutput",
    "ResidualVQ",
    "SlotAttentionPooling",
    "SoftVQ",
    "VQPooling",
]
