"""What the server of :mod:`tests.processes` imports before it forks; nothing here may start a thread."""

import torch

import ddcl_lightning.cli.commands
import ddcl_lightning.datamodules
import ddcl_lightning.integrations

__all__ = ["ddcl_lightning", "torch"]
