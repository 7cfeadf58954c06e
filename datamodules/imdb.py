"""IMDB: whole film reviews, positive or negative."""

from ddcl_lightning.datamodules._hub_texts import HubTextDataModule


class IMDBDataModule(HubTextDataModule):
    """Film reviews (Maas et al., 2011): ``stanfordnlp/imdb`` on the hub, 25,000 to train on and 25,000 to test on.

    The test reviews serve as validation too, unless ``val_fraction`` holds out training reviews.

    The arguments are those of :class:`~ddcl_lightning.datamodules.NamedTextDataModule`.
    """

    title = "IMDB"
    known_classes = ("negative", "positive")
    repository = "stanfordnlp/imdb"
    text_column = "text"
    hub_splits = ("train", "test")
