"""Decoders: from a readout's tokens back to images or vectors."""

from ddcl_lightning.decoders.base import Decoder
from ddcl_lightning.decoders.conv_decoder import ConvDecoder
from ddcl_lightning.decoders.mlp_decoder import MLPDecoder
from ddcl_lightning.decoders.sequence_decoder import SequenceDecoder

__all__ = ["ConvDecoder", "Decoder", "MLPDecoder", "SequenceDecoder"]
