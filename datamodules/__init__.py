"""Data modules: of well-known data sets and of a user's own files, on one base with splits and exact resume."""

from ddcl_lightning.datamodules._images import ImageDataModule
from ddcl_lightning.datamodules._named_texts import NamedTextDataModule
from ddcl_lightning.datamodules._partition import EvaluateOn, Loaded
from ddcl_lightning.datamodules._splits import SplitDataModule
from ddcl_lightning.datamodules._tensors import TensorDataModule
from ddcl_lightning.datamodules._torchvision import TorchvisionDataModule
from ddcl_lightning.datamodules.cifar10 import CIFAR10DataModule
from ddcl_lightning.datamodules.debris import DebrisDataModule
from ddcl_lightning.datamodules.digits import DigitsDataModule
from ddcl_lightning.datamodules.features import FeaturesDataModule
from ddcl_lightning.datamodules.image_folder import ImageFolderDataModule
from ddcl_lightning.datamodules.imdb import IMDBDataModule
from ddcl_lightning.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from ddcl_lightning.datamodules.newsgroups import NewsgroupsDataModule
from ddcl_lightning.datamodules.sst2 import SST2DataModule
from ddcl_lightning.datamodules.text import TextDataModule

__all__ = [
    "CIFAR10DataModule",
    "DebrisDataModule",
    "DigitsDataModule",
    "EvaluateOn",
    "FashionMNISTDataModule",
    "FeaturesDataModule",
    "IMDBDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "Loaded",
    "MNISTDataModule",
    "NamedTextDataModule",
    "NewsgroupsDataModule",
    "SST2DataModule",
    "SplitDataModule",
    "TensorDataModule",
    "TextDataModule",
    "TorchvisionDataModule",
]
