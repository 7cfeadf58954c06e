"""Pictures of an autoencoder at work, for TensorBoard or as files."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from matplotlib.figure import Figure
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch
from ddcl_lightning._utils.distributed import sum_over_processes
from ddcl_lightning._utils.saved_state import restores
from ddcl_lightning.callbacks._figures import MAX_POINTS, ValidationFigures
from ddcl_lightning.functional import code_counts
from ddcl_lightning.metrics.codebook_metrics import CodebookMetrics
from ddcl_lightning.monitoring.autoencoder_plots import draw_atoms, draw_codebook_history, draw_images
from ddcl_lightning.monitoring.plots import draw_usage
from ddcl_lightning.tasks.readout_module import ReadoutModule
from ddcl_lightning.tasks.reconstruction import Reconstruction

CURVES = ("mse", "psnr", "usage", "perplexity")


class _Decoded(NamedTuple):
    """One batch of images, and the codes as images with their number of tokens, a pair per codebook; on the CPU."""

    originals: Tensor | None
    decoded: Tensor | None
    atoms: list[tuple[Tensor, Tensor]]


class ReconstructionFigures(ValidationFigures):
    """Figures every ``every_n_epochs`` of an autoencoder's reconstructions and the use of its codes.

    * images beside what comes back, always the first ones of the validation data;
    * atoms: what each code stands for. A code is decoded as an image whose every token is the mean of those tokens of
      the first validation batch that have the code; in a straight-through codebook that is the code itself. Codes
      that no token of the batch has are crossed out;
    * how often the whole validation set has each code;
    * perplexity, use and PSNR over time.

    The first two need a decoder of images, all but the first a head with codes. Without validation data nothing is
    drawn. Figures go to TensorBoard; with another logger, or none, they are written as PNG files to the folder
    ``figures`` in that of the run.

    Args:
        every_n_epochs: Interval between figures; the end of training is drawn too.
        num_images: Images shown, at least 1.

    Raises:
        ValueError: If an argument is below 1, or the module's task is not :class:`~ddcl_lightning.Reconstruction`.
    """

    @typed
    def __init__(self, every_n_epochs: int = 10, num_images: int = 8) -> None:
        super().__init__(every_n_epochs)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1; got {num_images}. Pass 1 or more.")
        self.num_images = num_images
        self._history: list[dict[str, float]] = []
        self._counts: Tensor | None = None

    def require(self, module: pl.LightningModule) -> None:
        """Raise unless the module's task is a Reconstruction."""
        task = getattr(module, "task", None)
        if not (isinstance(module, ReadoutModule) and isinstance(task, Reconstruction)):
            raise ValueError(
                "ReconstructionFigures needs a DDCLReadoutModule whose task is Reconstruction; got "
                f"{type(module).__name__} with task {type(task).__name__}. Remove the callback, or use "
                "PrototypeFigures."
            )

    def forget(self) -> None:
        """Drop the curves and counts of an earlier run."""
        self._history, self._counts = [], None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the counts of the codes, over all processes, before the module logs and forgets them."""
        assert isinstance(pl_module, ReadoutModule)
        metrics = pl_module.stage_metrics["val_metrics"].modules()
        codebook_metrics = next((metric for metric in metrics if isinstance(metric, CodebookMetrics)), None)
        self._counts = None if codebook_metrics is None else sum_over_processes(codebook_metrics.counts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add one point to the curves."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {name: trainer.callback_metrics.get(f"val/{name}") for name in CURVES}
        point = {name: float(value) for name, value in values.items() if value is not None}
        self._history.append({"step": float(trainer.global_step), **point})
        if len(self._history) > MAX_POINTS:
            del self._history[1::2]

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> _Decoded:
        """Images and decoded codes of the batch, for a decoder of images."""
        assert isinstance(module, ReadoutModule)
        task, readout = module.task, module(batch)
        assert isinstance(task, Reconstruction)
        decoded, originals, _ = task.compared(readout, batch)
        if decoded.dim() != 4:
            return _Decoded(None, None, [])
        atoms = []
        if readout.codes is not None and module.head.num_codes is not None:
            for codes in readout.codes.unbind(-1):
                vectors, counts = mean_tokens(readout.tokens, codes, module.head.num_codes)
                images = task.decode(vectors.unsqueeze(1).expand(-1, readout.tokens.shape[1], -1))
                atoms.append((_plain(images), counts.cpu()))
        return _Decoded(_plain(originals), _plain(decoded), atoms)

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule, evaluated: _Decoded) -> dict[str, Figure]:
        """Images, atoms, the use of the codes and its history."""
        figures: dict[str, Figure] = {}
        if not self._history:
            return figures
        originals, decoded, atoms = evaluated
        if originals is not None and decoded is not None:
            shown = slice(self.num_images)
            figures["images"] = draw_images(originals[shown], decoded[shown], "first validation images")
            low, high = (float(value) for value in originals.aminmax())
            for book, (images, counts) in enumerate(atoms):
                label = _label(book, len(atoms))
                tokens = "one validation batch's tokens"
                figures[f"atoms/{label}"] = draw_atoms(images, counts, low, high, label, tokens=tokens)
        if self._counts is not None:
            counts = self._counts.cpu()
            for book, used in enumerate(counts):
                label = _label(book, len(counts))
                figures[f"codes/{label}"] = draw_usage(used, None, label, noun="code", tokens="the validation tokens")
            title = "Validation" + (f", mean of {len(counts)} codebooks" if len(counts) > 1 else "")
            figures["codes/history"] = draw_codebook_history(self._history, counts.shape[1], title)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"history": self._history}

    @restores(history=Sequence)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves."""
        self._history = list(state_dict["history"])


def mean_tokens(tokens: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Mean of the tokens ``(B, T, D)`` that have each code, ``(K, D)``, and their number ``(K,)``; codes ``(B, T)``.

    Padding, code -1, is left out; a code that no token has gets a zero vector.
    """
    rows = codes.flatten() + 1
    sums = tokens.new_zeros(num_codes + 1, tokens.shape[-1]).index_add_(0, rows, tokens.flatten(0, 1))[1:]
    counts = code_counts(codes.flatten(), num_codes)
    return sums / counts.clamp(min=1).unsqueeze(1), counts


def _label(book: int, books: int) -> str:
    return f"codebook{book}" if books > 1 else "codebook"


def _plain(images: Tensor) -> Tensor:
    return images.detach().float().cpu()
