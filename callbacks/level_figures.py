"""Pictures of what the prototypes of every level stand for, for TensorBoard or as files."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs
from ddcl_lightning.callbacks._figures import ValidationFigures
from ddcl_lightning.callbacks.reconstruction_figures import mean_tokens
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.monitoring.autoencoder_plots import draw_atoms
from ddcl_lightning.monitoring.recording import BankRecord, record_codebooks
from ddcl_lightning.monitoring.records import head_name
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.tasks.readout_module import ReadoutModule

_Shown = tuple[BankRecord, Tensor | None, str]  # what a bank saw, an image of each token, and what these are


class LevelFigures(ValidationFigures):
    """Figures every ``every_n_epochs`` of each bank's prototypes: the mean image of the tokens nearest to each.

    A bank that reads one vector per image shows mean images; one that reads the backbone's tokens shows the mean
    pieces that the tokens are of, where the backbone knows them (:class:`~ddcl_lightning.PatchBackbone`, or any with
    ``pieces``). All are of the first validation batch; prototypes that nothing of it is nearest to are crossed out.
    Banks that cannot be shown, and data that are no images, are named once and left out.

    Figures go to TensorBoard; with another logger, or none, they are written as PNG files to the folder ``figures``
    in that of the run.

    Args:
        every_n_epochs: Interval between figures; the end of training is drawn too.

    Raises:
        ValueError: If the interval is below 1, or the module is no DDCLReadoutModule.
    """

    @typed
    def __init__(self, every_n_epochs: int = 10) -> None:
        super().__init__(every_n_epochs)
        self._left_out: set[str] = set()

    def require(self, module: pl.LightningModule) -> None:
        """Raise unless the module is a :class:`~ddcl_lightning.DDCLReadoutModule`."""
        if not isinstance(module, ReadoutModule):
            raise ValueError(
                f"LevelFigures needs a DDCLReadoutModule; got {type(module).__name__}. Remove the callback, or use "
                "PrototypeFigures."
            )

    def forget(self) -> None:
        """Clear the list of banks that were reported as left out."""
        self._left_out = set()

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> dict[str, _Shown]:
        """Records of every bank for the batch, and the parts of images that its tokens stand for."""
        assert isinstance(module, ReadoutModule)
        observations: dict[str, BankRecord] = {}
        with record_codebooks(find_banks(module), observations.__setitem__):
            module(batch)
            pieces = module.backbone.pieces(batch)
        return {name: (observed, *_images(observed, inputs(batch), pieces)) for name, observed in observations.items()}

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule, evaluated: dict[str, _Shown]) -> dict[str, Figure]:
        """Figures of the prototypes of every bank that can be drawn."""
        figures: dict[str, Figure] = {}
        for name, (observed, images, tokens) in evaluated.items():
            if images is None:
                self._leave_out(name)
            else:
                figures |= _pictures(name, observed, images, tokens)
        return figures

    def _leave_out(self, name: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            rank_zero_info(
                f"LevelFigures leaves out {name}: its tokens are neither whole images nor the pieces that the backbone "
                "knows. Images are batches with x (B, C, H, W), all tokens valid."
            )


def _images(observed: BankRecord, images: Tensor, pieces: Tensor | None) -> tuple[Tensor | None, str]:
    """One image ``(N, C, H, W)`` for each token of a bank, and what they are; None where there is none."""
    if observed.mask is not None or images.dim() != 4:
        return None, ""
    images = images / 255 if images.dtype == torch.uint8 else images
    if observed.tokens.shape[1] == len(images):
        return images, "the validation images (one batch)"
    if pieces is not None and observed.tokens.shape[1] == pieces.shape[0] * pieces.shape[1]:
        return pieces.flatten(0, 1), "the pieces of the validation images (one batch)"
    return None, ""


def _pictures(name: str, observed: BankRecord, images: Tensor, tokens: str) -> dict[str, Figure]:
    """One figure per head."""
    codes = nearest_prototype(observed.tokens, observed.codebook)
    heads, size = observed.codebook.shape[:2]
    rows = images.detach().float().cpu()
    low, high = (float(value) for value in rows.aminmax())
    figures = {}
    for head in range(heads):
        label = head_name(name, head, heads)
        means, counts = mean_tokens(rows.flatten(1).unsqueeze(1), codes[head].cpu().unsqueeze(1), size)
        atoms = torch.unflatten(means, -1, rows.shape[1:])
        drawn = draw_atoms(atoms, counts, low, high, label, noun="prototype", tokens=tokens)
        figures[f"prototypes/{label}"] = drawn
    return figures
