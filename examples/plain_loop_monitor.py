"""A plain training loop of a VQ-VAE with vector-quantize-pytorch; the two lines with ``monitor`` are new.

Runs offline on the digits of scikit-learn, in seconds on a CPU.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import mse_loss
from vector_quantize_pytorch import ResidualVQ

from ddcl_lightning import CodebookMonitor


def main(steps: int = 600) -> CodebookMonitor:
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data / 16).float()
    encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    quantizer = ResidualVQ(dim=8, codebook_size=32, num_quantizers=2, kmeans_init=True)
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
    model = nn.ModuleDict({"encoder": encoder, "quantizer": quantizer, "decoder": decoder})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = CodebookMonitor(model)
    for _ in range(steps):
        strips = images[torch.randint(len(images), (64,))].unflatten(1, (4, 16))  # two rows are a token
        quantized, _, losses = quantizer(encoder(strips))
        loss = mse_loss(decoder(quantized), strips) + 0.1 * losses.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.check(loss)
    print(f"loss {loss.item():.4f}\n{monitor.report()}\n{monitor.verdict()}")
    return monitor


if __name__ == "__main__":
    main()
