"""SST-2: sentences of film reviews, positive or negative."""

from ddcl_lightning.datamodules._hub_texts import HubTextDataModule


class SST2DataModule(HubTextDataModule):
    """Stanford Sentiment Treebank in two classes (Socher et al., 2013), as in GLUE: ``stanfordnlp/sst2`` on the hub.

    67,349 phrases to train on. The labels of its test split are secret, so the 872 validation sentences serve for
    validation and test.

    The arguments are those of :class:`~ddcl_lightning.datamodules.NamedTextDataModule`.
    """

    title = "SST-2"
    known_classes = ("negative", "positive")
    repository = "stanfordnlp/sst2"
    text_column = "sentence"
    hub_splits = ("train", "validation")
