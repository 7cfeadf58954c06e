"""Stepping: two time scales, the token-normalized step, and optimizers whose prototypes change their number."""

from ddcl_lightning.optim.factory import OptimizerConfig
from ddcl_lightning.optim.resizing import SizeRules
from ddcl_lightning.optim.schedule import LRSchedule
from ddcl_lightning.optim.token_normalized import TokenNormalized
from ddcl_lightning.optim.two_timescale import two_timescale_groups

__all__ = ["LRSchedule", "OptimizerConfig", "SizeRules", "TokenNormalized", "two_timescale_groups"]
