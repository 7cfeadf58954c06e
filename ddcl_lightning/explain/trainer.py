"""``ddcl explain``: a Trainer whose further stage is a report."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from ddcl_lightning._utils import compat
from ddcl_lightning._utils.files import write_text
from ddcl_lightning.callbacks._id_table import residual_quantizer
from ddcl_lightning.checkpoints.reading import other_model, read_checkpoint
from ddcl_lightning.explain.batch_summary import Observer
from ddcl_lightning.explain.collection import check_arguments, collect
from ddcl_lightning.explain.explanation import Explanation
from ddcl_lightning.explain.id_report import render_tree
from ddcl_lightning.explain.id_tree import IDTree, collect_tree
from ddcl_lightning.explain.report import render
from ddcl_lightning.module import DDCLReadoutModule
from ddcl_lightning.tasks import SemanticIDs


class ExplainingTrainer(pl.Trainer):
    """A :class:`~lightning.pytorch.Trainer` that can also write a report."""

    def explain(
        self,
        model: DDCLReadoutModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None = None,
        output: str = "report.html",
        examples: int = 5,
        inputs: int = 20,
        indices: list[int] | None = None,
        max_samples: int = 10_000,
        evaluated: int = 200,
        weights_only: bool | None = None,
    ) -> None:
        """Write a report of what the prototypes of a trained model stand for, as one HTML page.

        Of a model whose task is :class:`~ddcl_lightning.SemanticIDs` it is the tree of the IDs.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint file of the trained model; needed, since fresh prototypes are random.
            output: File to write; its folder must exist.
            examples: Nearest examples per prototype (or branch of the tree), at least 1.
            inputs: Inputs to show, spread over the data; 0 shows none.
            indices: Places of inputs to show instead, such as [3, 17]: the column ``index`` of ``ddcl predict``.
            max_samples: Training samples to read.
            evaluated: Inputs from which the mean contributions of the prototypes and their faithfulness are computed;
                0 leaves both out.
            weights_only: As for :meth:`~lightning.pytorch.Trainer.predict`.

        Raises:
            ValueError: If an argument is out of its range, there is no checkpoint, or the head has no prototypes.
        """
        check_request(ckpt_path, output)
        check_arguments(examples, inputs, indices, max_samples, evaluated)
        if self.world_size > 1:
            raise ValueError(
                f"explain runs in one process; got {self.world_size}. Use --trainer.devices 1 --trainer.num_nodes 1."
            )
        of_ids = isinstance(model.task, SemanticIDs)
        residual_quantizer(model) if of_ids else Observer(model)  # a head without is refused before the work
        self._load(model, datamodule, ckpt_path, weights_only)
        model.to(self.strategy.root_device)
        arguments: dict[str, Any] = {
            "examples": examples,
            "inputs": inputs,
            "indices": indices,
            "max_samples": max_samples,
            **({} if of_ids else {"evaluated": evaluated}),
            "checkpoint": Path(str(ckpt_path)).name,
            "to_device": lambda batch: compat.to_device(self, batch),
            "progress": self.progress_bar_callback is not None,
        }
        with self.precision_plugin.predict_step_context():
            explanation = (collect_tree if of_ids else collect)(model, datamodule, **arguments)
        explanation = replace(explanation, health=_health(str(ckpt_path)))
        write_text(output, render_tree(explanation) if isinstance(explanation, IDTree) else render(explanation))
        rank_zero_info(f"Wrote {output} ({Path(output).stat().st_size / 1024:,.0f} KiB): {_contents(explanation)}.")

    def _load(
        self,
        model: DDCLReadoutModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None,
        weights_only: bool | None,
    ) -> None:
        """Set up model and data as ``predict`` does, whose prediction over no batches restores the checkpoint."""
        self.limit_predict_batches = 0
        try:
            with warnings.catch_warnings():  # a report needs none of the callbacks of the run
                warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
                warnings.filterwarnings("ignore", "The dirpath has changed from")
                self.predict(
                    model,
                    datamodule=datamodule,
                    return_predictions=False,
                    ckpt_path=ckpt_path,
                    weights_only=weights_only,
                )
        except RuntimeError as error:
            if (sentence := other_model(str(error), ckpt_path)) is None:
                raise
            raise ValueError(sentence) from error


def _health(checkpoint: str) -> tuple[str, ...]:
    """Verdicts of a CollapseWarning at the time of the checkpoint."""
    states = read_checkpoint(checkpoint).get("callbacks", {})
    verdicts = (state.get("verdict", "") for key, state in states.items() if key.startswith("CollapseWarning"))
    return tuple(line for verdict in verdicts for line in verdict.splitlines())


def _contents(explanation: Explanation | IDTree) -> str:
    """Contents of a report in words."""
    if isinstance(explanation, IDTree):
        metrics = explanation.metrics
        return f"{int(metrics['distinct_ids']):,} distinct IDs of {int(metrics['items']):,} items"
    prototypes = [prototype for head in explanation.heads for prototype in head.prototypes]
    return (
        f"{len(prototypes)} prototypes ({sum(prototype.dead for prototype in prototypes)} dead), "
        f"{explanation.samples:,} samples, {len(explanation.inputs)} inputs"
    )


def check_request(ckpt_path: str | None, output: str) -> None:
    """Raise for arguments that cannot work, before any model or data is built.

    Raises:
        ValueError: If the checkpoint is missing or is none, or the file cannot be written.
    """
    if ckpt_path is None:
        raise ValueError(
            "ckpt_path is needed: without a checkpoint the prototypes are random. Pass --ckpt_path FILE.ckpt, which "
            "`ddcl fit` writes below lightning_logs/."
        )
    read_checkpoint(ckpt_path)
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output must end in .html; got {output!r}. Name it report.html, say.")
    if not target.parent.is_dir():
        raise ValueError(f"output must lie in an existing folder; there is no {str(target.parent)!r}. Create it first.")
    if target.is_dir():
        raise ValueError(f"output must be a file; {output!r} is a folder. Name a file in it.")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"output must lie where you may write; {output!r} does not. Choose another folder.")
