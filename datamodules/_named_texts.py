"""The base of the well-known text data sets, downloaded or read from a file."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._optional import unavailable
from ddcl_lightning.datamodules._partition import EvaluateOn, Split
from ddcl_lightning.datamodules._texts import TextRows, TextSplitDataModule
from ddcl_lightning.datamodules.text import read_one_file


class NamedTextDataModule(TextSplitDataModule):
    """A well-known text data set.

    Args:
        path: File in one of the formats of :class:`~ddcl_lightning.datamodules.TextDataModule` with the columns
            ``text``, ``label`` (number or name of the class) and ``split``. None downloads the data set once, into the
            cache of the package that does it.
        drop_empty: Leave out texts of white space, which have no tokens of meaning, with a warning that counts them.
        batch_size: Rows per training batch and process, at least 1.
        eval_batch_size: The same for all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out of the training split for validation, in [0, 1).
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for the arguments around it.
        limit: Train on at most this many texts, every class keeping its share.
        seed: Seed of split, limit and order; by default that of ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for texts in memory.

    Raises:
        ValueError: If an argument is out of its range; at set-up, if the file cannot be used.
        FileNotFoundError: At set-up, if the file does not exist.
        ConnectionError: If the data set is neither here nor can be downloaded.
        ImportError: If the package that downloads it is missing.
    """

    title: ClassVar[str]

    @typed
    def __init__(
        self,
        path: str | Path | None = None,
        drop_empty: bool = True,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            drop_empty=drop_empty,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        self.path = path
        self.remedy = (
            "Pass as path a .jsonl.gz, .csv or .parquet file with the columns text, label and split; prepare_data() "
            "downloads the data set once there is a network."
        )

    @abstractmethod
    def downloaded(self) -> dict[Split, TextRows] | None:
        """Texts and labels of each split; None where they were not downloaded yet."""

    @abstractmethod
    def download(self) -> None:
        """Download the data set, or raise a ConnectionError."""

    def prepare_data(self) -> None:
        """Download the data set, unless it is on this machine already."""
        if self.path is None:
            self.download()

    def read(self) -> dict[Split, TextRows]:
        """Texts and labels of each split, from the file or from what was downloaded."""
        if self.path is not None:
            return read_one_file(self.path, "text", "label", "split")
        splits = self.downloaded()
        if splits is None:
            raise ConnectionError(unavailable(self.title, "it was not downloaded yet", self.remedy))
        return splits
