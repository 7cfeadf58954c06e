"""Text data sets of the Hugging Face hub, through the package ``datasets``."""

from typing import Any, ClassVar

from ddcl_lightning.datamodules._named_texts import NamedTextDataModule
from ddcl_lightning.datamodules._optional import reason, require, unavailable
from ddcl_lightning.datamodules._partition import SPLIT_NAMES, Split
from ddcl_lightning.datamodules._texts import TextRows

TIMEOUT_SECONDS = 10.0


class HubTextDataModule(NamedTextDataModule):
    """A text data set of the Hugging Face hub, or a copy of it in a file.

    The arguments are those of :class:`NamedTextDataModule`.
    """

    repository: ClassVar[str]
    text_column: ClassVar[str]
    hub_splits: ClassVar[tuple[str, ...]]

    def download(self) -> None:
        """Fetch the data set into the cache of ``datasets``, unless it is there."""
        datasets = require("datasets", "text")
        if self.downloaded() is not None:
            return
        hub = require("huggingface_hub", "text")
        try:
            # One attempt of its own: datasets would ask for half a minute before it says that nobody answers.
            hub.HfApi().dataset_info(self.repository, timeout=TIMEOUT_SECONDS)
            datasets.load_dataset(self.repository)
        except Exception as error:  # of whichever HTTP client the hub uses
            failed = f"the download of {self.repository} failed ({reason(error)})"
            raise ConnectionError(unavailable(self.title, failed, self.remedy)) from None

    def downloaded(self) -> dict[Split, TextRows] | None:
        """The splits in the cache of ``datasets``."""
        datasets = require("datasets", "text")
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = True  # the cache alone; otherwise it asks the hub for news first
        try:
            dataset: dict[str, Any] = datasets.load_dataset(self.repository)
        except (OSError, ValueError):  # a ConnectionError, or no such configuration in the cache
            return None
        finally:
            datasets.config.HF_HUB_OFFLINE = before
        return {
            SPLIT_NAMES[name]: TextRows(list(dataset[name][self.text_column]), list(dataset[name]["label"]))
            for name in self.hub_splits
        }
