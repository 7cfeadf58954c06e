"""Prototypes as a linear layer on normalised features: SwAV, DINO and what a user names."""

from collections.abc import Mapping

from torch import Tensor, nn

from ddcl_lightning.monitoring.records import CodebookRecord
from ddcl_lightning.monitoring.remedies import PROTOTYPES
from ddcl_lightning.monitoring.sources.base import CodebookSource
from ddcl_lightning.monitoring.sources.observed_calls import Call


class LinearPrototypes(CodebookSource):
    """The rows of an ``nn.Linear`` as prototypes of its inputs; the code is the largest output.

    Found by themselves are the Linear layers of a class with "Prototypes" in its name that holds nothing else (SwAV's,
    also lightly's), and the ``last_layer`` of one with "DINO" or "iBOT" in its name.
    """

    advice = PROTOTYPES

    @classmethod
    def sources_in(cls, module: nn.Module) -> Mapping[str, CodebookSource]:
        """The linear layers that a module holds as prototypes."""
        name = type(module).__name__.lower()
        last = getattr(module, "last_layer", None)
        if ("dino" in name or "ibot" in name) and isinstance(last, nn.Linear):
            return {"last_layer": cls(last)}
        inner = dict(module.named_modules())
        del inner[""]
        if "prototypes" in name and all(isinstance(child, (nn.Linear, nn.ModuleList)) for child in inner.values()):
            return {path: cls(child) for path, child in inner.items() if isinstance(child, nn.Linear)}
        return {}

    def read(self, call: Call) -> CodebookRecord:
        """The record of ``forward(features)``, which returns a score for each prototype."""
        weight: Tensor = call.module.weight  # type: ignore[assignment]
        return CodebookRecord.of_codes(
            call.argument(0, "input"), weight, call.output.detach().argmax(-1), geometry="cosine"
        )
