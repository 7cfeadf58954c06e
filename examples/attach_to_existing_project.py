"""Four callbacks attach to a Lightning project that knows nothing of this package but one layer.

The project below has its own model, automatic optimization, one optimizer and plain ``(x, y)`` batches. Only the
``callbacks=`` line is new. Runs offline on the digits of scikit-learn, in seconds on a CPU.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ddcl_lightning import DDCLAttention
from ddcl_lightning.callbacks import CollapseWarning, DecompositionCheck, KMeansInitialization, TemperatureAnnealing


class DigitClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32))
        self.readout = DDCLAttention(32, num_prototypes=16, embedding_scale="per_dimension")
        self.classifier = nn.Linear(4 * 32, 10)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, digits = batch
        read = self.readout(self.encoder(images.unflatten(1, (4, 16))))  # four strips of two rows are four tokens
        logits = self.classifier(read.tokens.flatten(1))
        loss = nn.functional.cross_entropy(logits, digits) + 0.1 * read.terms.loss.sum()
        self.log("accuracy", (logits.argmax(1) == digits).float().mean(), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        prototypes = self.readout.bank.prototypes
        rest = [parameter for parameter in self.parameters() if parameter is not prototypes]
        return torch.optim.Adam([{"params": [prototypes], "lr": 1e-2}, {"params": rest}], lr=1e-3)


def main(max_epochs: int = 15) -> pl.Trainer:
    pl.seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(pixels / 16).float(), torch.from_numpy(digits))
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[TemperatureAnnealing(), KMeansInitialization(), DecompositionCheck(), CollapseWarning()],
    )
    trainer.fit(DigitClassifier(), DataLoader(data, batch_size=64, shuffle=True))
    signals = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("accuracy", *sorted(name for name in signals if name.startswith("ddcl/"))):
        print(f"{name:<42}{signals[name]:.4g}")
    return trainer


if __name__ == "__main__":
    main()
