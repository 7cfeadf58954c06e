"""Decoders: from a readout's tokens back to images or vectors."""

from ddcl_lightning.decoders.base import Decoder
from ddcl_lightning.decoders.conv import ConvDecoder
from ddcl_lightning.decoders.sequence import SequenceDecoder

__all__ = ["ConvDecoder", "Decoder", "SequenceDecoder"]
