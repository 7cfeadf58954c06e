"""Data modules for the default recipes; both run without a download."""

from ddcl_lightning.datamodules.debris import DebrisDataModule
from ddcl_lightning.datamodules.digits import DigitsDataModule

__all__ = ["DebrisDataModule", "DigitsDataModule"]
