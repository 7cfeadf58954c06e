"""Backbones: from a batch to tokens."""

from ddcl_lightning.backbones.base import Backbone, Tokens
from ddcl_lightning.backbones.identity import IdentityBackbone
from ddcl_lightning.backbones.pca import PCABackbone

__all__ = ["Backbone", "IdentityBackbone", "PCABackbone", "Tokens"]
