"""Reconstruction: an autoencoder whose bottleneck is the head."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ddcl_lightning._utils.arguments import described, typed
from ddcl_lightning._utils.batch import Batch, inputs
from ddcl_lightning._utils.distributed import token_weight
from ddcl_lightning.decoders.base import Decoder
from ddcl_lightning.functional._common import accumulation_dtype, masked_mean
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.heads.contracts import check_plug_in
from ddcl_lightning.metrics.codebook_metrics import CodebookMetrics
from ddcl_lightning.metrics.reconstruction_metrics import ReconstructionMetrics
from ddcl_lightning.tasks.base import Task, note_unused_weight, with_head_losses

ReconstructionLoss = Literal["mse", "l1"]


class Reconstruction(Task):
    """A decoder on the readout's tokens: ``L_rec + lambda (L_OLS + V)`` (eq. 16, section 7.4).

    The head sits between encoder and decoder: prototypes (``L_q = L_OLS + V``), straight-through codes, whose losses
    are the readout's ``regularization`` and count in full, or neither: ``MeanPooling``, whose tokens are the
    encoder's, makes a plain autoencoder.

    What has to come back is ``target``:

    * an entry of the batch: ``"x"``, the input, or any other name. Bytes are scaled to [0, 1], and flat rows
      ``(B, N)`` take the decoder's shape;
    * ``"tokens"``, the tokens that the head has read. No batch holds them, so the module keeps them in
      ``ReadoutOutput.inputs``, for every head alike. The encoder must be frozen: a trainable one would earn the loss
      by shrinking its tokens.

    ``L_rec`` is a mean over pixels and channels, or over the entries of all valid tokens, whereas ``L_q`` is a squared
    distance in all dimensions of a token: lambda has to make up for that.

    Args:
        decoder: Tokens to images or vectors.
        quantization_weight: lambda >= 0; a head without prototypes has no ``L_q`` and does not use it.
        loss: ``"mse"``, squared errors, or ``"l1"``, absolute ones.
        target: What has to come back.
        data_range: Largest less smallest possible value of a pixel, > 0, for PSNR and SSIM.

    Raises:
        ValueError: If an argument is out of its range; during training, if the decoder's output does not fit the
            target, or the encoder of ``target="tokens"`` is trained.
        TypeError: If the batch holds no such target.
    """

    @typed
    def __init__(
        self,
        decoder: Decoder,
        quantization_weight: float = 0.1,
        loss: ReconstructionLoss = "mse",
        target: str = "x",
        data_range: float = 1.0,
    ) -> None:
        super().__init__()
        check_plug_in(decoder)
        if quantization_weight < 0:
            raise ValueError(f"quantization_weight must be >= 0; got {quantization_weight}. Pass 0 or more.")
        if loss not in get_args(ReconstructionLoss):
            raise ValueError(f"loss must be one of {get_args(ReconstructionLoss)}; got {loss!r}. Choose one of them.")
        ReconstructionMetrics(data_range)  # refuse early
        self.decoder, self.quantization_weight, self.loss = decoder, quantization_weight, loss
        self.target, self.data_range = target, data_range
        self._codebooks: tuple[int, int] | None = None

    def build(self, head: Head) -> None:
        """Build the decoder for the head's tokens, and read the size of its codebooks."""
        note_unused_weight(head, self.quantization_weight)
        self.decoder.build(head.token_dim)
        if head.num_codes is not None:
            self._codebooks = (head.num_codes, head.num_codebooks)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images ``(B, C, H, W)`` or vectors ``(B, T, D)`` of tokens ``(B, T, token_dim)``, float32 at least."""
        decoded = self.decoder(tokens, mask)
        if not isinstance(decoded, Tensor):
            raise TypeError(
                f"{type(self.decoder).__name__}.forward() must return a tensor, images (B, C, H, W) or vectors "
                f"(B, T, D); got {described(decoded)}. Return what is compared with the target alone."
            )
        return decoded.to(accumulation_dtype(decoded))

    def compared(self, readout: ReadoutOutput, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decoded output, its target, and for sequences the mask ``(B, T)`` of the vectors that count."""
        decoded, target = self.decode(readout.tokens, readout.mask), self._target(readout, batch)
        if target.dim() == 2 and target.shape[1] == decoded[0].numel():
            target = target.reshape(decoded.shape)
        if decoded.shape != target.shape:
            raise ValueError(
                f"the decoder must give the shape of the target {self.target!r}, {tuple(target.shape)}; got "
                f"{tuple(decoded.shape)}. Set the decoder's sizes to it."
            )
        return decoded, target.to(decoded.dtype), readout.mask if decoded.dim() == 3 else None

    def losses(self, readout: ReadoutOutput, batch: Batch) -> Mapping[str, Tensor]:
        """``L_rec`` + lambda ``L_q`` (+ the head's regularization), and each of them beside it."""
        decoded, target, mask = self.compared(readout, batch)
        difference = decoded - target
        error = difference.square() if self.loss == "mse" else difference.abs()
        reconstruction = error.mean() if mask is None else masked_mean(error.mean(-1).flatten(), mask.flatten())
        reconstruction = reconstruction * token_weight(mask if self.training else None)
        return with_head_losses("reconstruction", reconstruction, readout, self.quantization_weight)

    def metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """MSE, PSNR and SSIM, and the use of the codes where the head has some."""
        collections: dict[str, Metric | MetricCollection] = {"reconstruction": ReconstructionMetrics(self.data_range)}
        if self._codebooks is not None:
            collections["codes"] = CodebookMetrics(*self._codebooks)
        return {"": MetricCollection(collections, compute_groups=False)}

    def update_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Compare the batch with what came back, and count its codes; each metric takes what it knows by name."""
        if self._codebooks is not None and readout.codes is None:
            raise ValueError(
                f"a head with num_codes = {self._codebooks[0]} must give the codes of its tokens in evaluation mode; "
                "got None in ReadoutOutput.codes. Fill it, or leave num_codes None."
            )
        decoded, target, mask = self.compared(readout, batch)
        metrics[""].update(
            prediction=decoded, target=target, mask=mask, codes=readout.codes, assignments=readout.assignments
        )

    def train_metrics(self) -> Mapping[str, Metric | MetricCollection]:
        """Metrics of the use of the codes, which training computes anyway."""
        return {} if self._codebooks is None else {"": CodebookMetrics(*self._codebooks)}

    def update_train_metrics(
        self, metrics: Mapping[str, Metric | MetricCollection], readout: ReadoutOutput, batch: Batch
    ) -> None:
        """Count the batch's codes, where the head gives them while training."""
        if metrics and readout.codes is not None:
            metrics[""].update(readout.codes)

    def predict(self, readout: ReadoutOutput, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of each sample, ``(B,)``."""
        decoded, target, mask = self.compared(readout, batch)
        return {"mse": masked_mean((decoded - target).square().flatten(2).mean(-1), mask)}

    def _target(self, readout: ReadoutOutput, batch: Batch) -> Tensor:
        if self.target == "tokens":
            if readout.inputs is None:
                raise ValueError("target 'tokens' needs the readout's inputs; got None. Call the module, not its head.")
            if readout.inputs.requires_grad:
                raise ValueError(
                    "target 'tokens' needs a frozen encoder; got one that is trained, which would shrink its tokens. "
                    "Set rho=0, or another target."
                )
            return readout.inputs
        value = inputs(batch) if self.target == "x" else batch.get(self.target) if isinstance(batch, dict) else None
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.uint8):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"the batch must hold the target {self.target!r} as a tensor of floating-point numbers or bytes; got "
                f"{kind}. Set target to the name of one, or convert it with .float()."
            )
        return value / 255 if value.dtype == torch.uint8 else value
