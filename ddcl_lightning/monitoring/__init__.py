"""Watching a codebook: recording what passes through it, signals of its health, their history and plots."""

from ddcl_lightning.monitoring.recording import CodebookRecord, record_codebooks
from ddcl_lightning.monitoring.signals import Signal

__all__ = ["CodebookRecord", "Signal", "record_codebooks"]
