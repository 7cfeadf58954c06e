"""Watching a codebook: recording what passes through it, signals of its health, their history and plots."""

from ddcl_lightning.monitoring.findings import CollapseError, Finding
from ddcl_lightning.monitoring.health_report import CodebookReport, MonitorReport
from ddcl_lightning.monitoring.monitor import CodebookMonitor
from ddcl_lightning.monitoring.recording import record_codebooks
from ddcl_lightning.monitoring.records import BankRecord, CodebookRecord
from ddcl_lightning.monitoring.rules import CollapseRules
from ddcl_lightning.monitoring.signals import Signal
from ddcl_lightning.monitoring.sources import CodebookSource, find_codebooks

__all__ = [
    "BankRecord",
    "CodebookMonitor",
    "CodebookRecord",
    "CodebookReport",
    "CodebookSource",
    "CollapseError",
    "CollapseRules",
    "Finding",
    "MonitorReport",
    "Signal",
    "find_codebooks",
    "record_codebooks",
]
