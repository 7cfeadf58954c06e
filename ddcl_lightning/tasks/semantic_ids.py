"""Semantic IDs: an autoencoder of items whose bottleneck is a tuple of codes."""

from collections.abc import Mapping

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ddcl_lightning._utils.batch import Batch, index
from ddcl_lightning.heads.base import ReadoutOutput
from ddcl_lightning.metrics.reconstruction_metrics import ReconstructionMetrics
from ddcl_lightning.metrics.semantic_id_metrics import SemanticIDMetrics
from ddcl_lightning.tasks.reconstruction import Reconstruction


class SemanticIDs(Reconstruction):
    """A :class:`~ddcl_lightning.Reconstruction` of items, each of which becomes a tuple of codes, one per level.

    An item is one token: a feature vector behind an ``MLPBackbone`` (an RQ-VAE), or a text behind a frozen encoder with
    ``tokens="mean"`` and ``target="tokens"``. Metrics are those of :class:`~ddcl_lightning.SemanticIDMetrics` over the
    items of the evaluation: let it run over all of them (``val_fraction=0``), for collisions are rarer in a part.
    Predictions have the ID of each item, ``semantic_id`` ``(B, L)``, of which
    :class:`~ddcl_lightning.AssignmentWriter` makes columns.

    The arguments are those of :class:`~ddcl_lightning.Reconstruction`. A head without codes makes a plain
    autoencoder, to see what the codes cost.

    Raises:
        ValueError: As there; in evaluation, if an item has several tokens.
    """

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """Error of the reconstruction, and the metrics of the IDs where the head has codes."""
        collections: dict[str, Metric | MetricCollection] = {"reconstruction": ReconstructionMetrics(self.data_range)}
        if self._codebooks is not None:
            collections["ids"] = SemanticIDMetrics(*self._codebooks)
        return {"": MetricCollection(collections, compute_groups=False)}

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Compare the batch with what came back, and count its IDs."""
        decoded, target, mask = self.compared(readout, batch)
        numbers = index(batch)
        metrics[""].update(
            prediction=decoded,
            target=target,
            mask=mask,
            ids=None if self._codebooks is None else item_codes(readout),
            vectors=target.flatten(1),
            decoded=decoded.flatten(1),
            index=None if numbers is None else numbers.to(decoded.device),
        )

    def predict(self, readout: ReadoutOutput, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of each item, ``(B,)``, and its ID, ``(B, L)``, where the head has codes."""
        columns = super().predict(readout, batch)
        return columns if self._codebooks is None else {"semantic_id": item_codes(readout), **columns}


def item_codes(readout: ReadoutOutput) -> Tensor:
    """Codes of items of one token each, ``(B, L)`` int64.

    Raises:
        ValueError: If there are none, or items have several tokens.
    """
    shape = None if readout.codes is None else tuple(readout.codes.shape)
    if readout.codes is None or readout.codes.shape[1] != 1:
        raise ValueError(
            f"a semantic ID needs the codes of one token per item, (B, 1, L); got {shape}. Give each item a single "
            "vector (tokens='mean' of a text encoder), or use Reconstruction."
        )
    return readout.codes[:, 0]
