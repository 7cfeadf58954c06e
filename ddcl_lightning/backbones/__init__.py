"""Backbones: from a batch to tokens."""

from ddcl_lightning._utils.batch import token_mask
from ddcl_lightning.backbones.base import Backbone, Tokens, input_sample
from ddcl_lightning.backbones.conv import ConvBackbone
from ddcl_lightning.backbones.identity import IdentityBackbone
from ddcl_lightning.backbones.lsa import LSABackbone
from ddcl_lightning.backbones.mlp import MLPBackbone
from ddcl_lightning.backbones.patches import PatchBackbone
from ddcl_lightning.backbones.pca import PCABackbone
from ddcl_lightning.backbones.pretrained import PretrainedBackbone
from ddcl_lightning.backbones.timm import TimmBackbone
from ddcl_lightning.backbones.transformers import TransformersBackbone

__all__ = [
    "Backbone",
    "ConvBackbone",
    "IdentityBackbone",
    "LSABackbone",
    "MLPBackbone",
    "PCABackbone",
    "PatchBackbone",
    "PretrainedBackbone",
    "TimmBackbone",
    "Tokens",
    "TransformersBackbone",
    "input_sample",
    "token_mask",
]
