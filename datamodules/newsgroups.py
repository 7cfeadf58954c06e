"""20 Newsgroups: posts of Usenet in twenty topics."""

from sklearn.datasets import fetch_20newsgroups

from ddcl_lightning.datamodules._named_texts import NamedTextDataModule
from ddcl_lightning.datamodules._optional import downloading
from ddcl_lightning.datamodules._partition import Split
from ddcl_lightning.datamodules._texts import TextRows


class NewsgroupsDataModule(NamedTextDataModule):
    """20 Newsgroups (Lang, 1995), split by date, without headers, footers and quotes, which would give topics away.

    Downloaded by scikit-learn into its own data folder: 11,314 posts to train on and 7,532 to test on, which serve as
    validation too. Some hold nothing else than what was removed; ``drop_empty`` leaves them out.

    The arguments are those of :class:`~ddcl_lightning.datamodules.NamedTextDataModule`.
    """

    title = "20 Newsgroups"
    known_classes = (
        "alt.atheism",
        "comp.graphics",
        "comp.os.ms-windows.misc",
        "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware",
        "comp.windows.x",
        "misc.forsale",
        "rec.autos",
        "rec.motorcycles",
        "rec.sport.baseball",
        "rec.sport.hockey",
        "sci.crypt",
        "sci.electronics",
        "sci.med",
        "sci.space",
        "soc.religion.christian",
        "talk.politics.guns",
        "talk.politics.mideast",
        "talk.politics.misc",
        "talk.religion.misc",
    )

    def download(self) -> None:
        """Fetch the posts into scikit-learn's data folder, unless they are there."""
        with downloading(self.title, self.remedy):
            fetch_20newsgroups(subset="all")

    def downloaded(self) -> dict[Split, TextRows] | None:
        """The posts in scikit-learn's data folder."""
        splits: dict[Split, TextRows] = {}
        for split in ("train", "test"):
            try:
                bunch = fetch_20newsgroups(
                    subset=split,
                    remove=("headers", "footers", "quotes"),
                    shuffle=False,
                    download_if_missing=False,
                )
            except OSError:
                return None
            splits[split] = TextRows(bunch.data, [bunch.target_names[label] for label in bunch.target])
        return splits
