"""What a module that composes backbone, head and task looks like to callbacks and evaluations."""

from collections.abc import Mapping
from dataclasses import replace

import lightning.pytorch as pl
from torch import Tensor, nn

from ddcl_lightning._utils.batch import Batch
from ddcl_lightning.backbones.base import Backbone
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.heads.contracts import (
    check_assignments,
    check_losses,
    check_readout_output,
    check_token_output,
)
from ddcl_lightning.nn.discovery import find_banks, prototypes_of
from ddcl_lightning.optim.two_timescale import parameter_ids
from ddcl_lightning.tasks.base import Task


class ReadoutModule(pl.LightningModule):
    """A LightningModule whose forward pass goes through a backbone and a head, for a task.

    Callbacks that need these parts ask for this class, so that they do not depend on how the module is stepped.
    """

    backbone: Backbone
    head: Head
    task: Task
    stage_metrics: nn.ModuleDict

    def forward(self, batch: Batch) -> ReadoutOutput:
        """The readout of a batch as the data loader yields it."""
        tokens, mask = check_token_output(self.backbone, self.backbone(batch))
        readout = check_readout_output(self.head, tokens, self.head(tokens, mask))
        if not self.training:
            check_assignments(self.head, readout.assignments, mask)
        return replace(readout, inputs=tokens, mask=mask)

    def losses(self, readout: ReadoutOutput, batch: Batch) -> Mapping[str, Tensor]:
        """Losses of the task, scalars: ``"loss"``, which trains, and those that are logged beside it."""
        return check_losses(self.task, self.task.losses(readout, batch))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role: ``prototypes``, ``encoder`` (they move what a bank sees) and ``task``."""
        inner = prototypes_of(find_banks(self.backbone).values())  # inside of the network
        prototypes = [*inner, *self.head.prototype_parameters()]
        inner_ids = parameter_ids(inner)
        encoder = [
            *(p for p in self.backbone.parameters() if id(p) not in inner_ids),
            *self.head.embedding_parameters(),
        ]
        known = parameter_ids([*prototypes, *encoder])
        rest = [p for stage in (self.head, self.task) for p in stage.parameters() if id(p) not in known]
        roles = {"prototypes": prototypes, "encoder": encoder, "task": rest}
        return {role: [p for p in parameters if p.requires_grad] for role, parameters in roles.items()}
