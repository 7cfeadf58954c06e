"""The ``ddcl`` command."""

from ddcl_lightning.cli.commands import main

__all__ = ["main"]
