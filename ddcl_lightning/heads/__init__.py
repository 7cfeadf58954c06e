"""Heads: from tokens to a readout."""

from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.heads.ddcl import DDCLReadout

__all__ = ["DDCLReadout", "Head", "ReadoutOutput"]
