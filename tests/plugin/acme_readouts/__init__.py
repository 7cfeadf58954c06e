"""A user's own package: one file for each thing that plugs in, which needs nothing of ours but its base class."""

from acme_readouts.backbone import Strips
from acme_readouts.data import StripedDataModule
from acme_readouts.decoder import StripDecoder
from acme_readouts.head import FurthestToken
from acme_readouts.metric import WithinOne
from acme_readouts.pooling import NormPooling
from acme_readouts.quantizer import SignQuantizer
from acme_readouts.signal import LargestShare
from acme_readouts.task import DigitRegression

__all__ = [
    "DigitRegression",
    "FurthestToken",
    "LargestShare",
    "NormPooling",
    "SignQuantizer",
    "StripDecoder",
    "StripedDataModule",
    "Strips",
    "WithinOne",
]
