"""An encoder and a bank that descend one potential at two rates, linearised, for the study of stability."""

import math
from collections.abc import Callable

import torch
from _dynamics import clusters, hessian
from _tables import Config, Run
from torch import Tensor

from ddcl_lightning.functional import critical_temperature

RATIOS = [10.0**power for power in range(-3, 4)]


def inertia(config: Config, seed: int, quick: bool) -> Run:
    """A linear autoencoder (4 to 2 to 4) with three prototypes on its code: eigenvalues of D(rho) H.

    The potential is the reconstruction error, a ridge on the decoder, and 0.5 L_q, or 0.5 F with detached assignments.
    """
    x = clusters(seed, size=60, dim=4)
    x = (x - x.mean(0)) / x.std(0)
    generator = torch.Generator().manual_seed(seed)
    _, _, directions = torch.linalg.svd(x)
    z = x @ directions[:2].T
    temperature = config["fraction"] * float(critical_temperature(z, detach_assignments=config["detach"]))
    p = z.mean(0).repeat(3, 1) if config["place"] == "collapsed" else torch.randn(3, 2, generator=generator)
    split = (8, 16)

    def potential(point: Tensor) -> Tensor:
        encoder, decoder, prototypes = point.tensor_split(split)
        code = x @ encoder.view(4, 2)
        distances = (code.unsqueeze(1) - prototypes.view(3, 2)).square().sum(-1)
        if config["detach"]:
            term = -temperature * (-distances / temperature).logsumexp(-1).mean()
        else:
            term = ((-distances / temperature).softmax(-1) * distances).sum(-1).mean()
        error = (x - code @ decoder.view(2, 4)).square().sum(-1).mean()
        return error + 0.5 * term + 0.02 * decoder.square().sum()  # or codes would shrink and the decoder grow for ever

    point = torch.cat([directions[:2].T.flatten(), directions[:2].flatten(), p.flatten()])
    if config["place"] == "trained":
        point = minimum(potential, point, 10 if quick else 500)
    curvature = hessian(potential, point)
    size, signs, growth, rates = float(curvature.abs().max()), set(), {}, {}
    for rho in RATIOS:
        # D H has the eigenvalues of the symmetric D^1/2 H D^1/2.
        root = torch.cat([torch.full((16,), math.sqrt(rho)), torch.ones(6)])
        values = torch.linalg.eigvalsh(root.unsqueeze(1) * curvature * root)
        zero = 1e-7 * size * min(rho, 1.0)
        signs.add(f"{int((values > zero).sum())}, {int((values.abs() <= zero).sum())}, {int((values < -zero).sum())}")
        growth[f"{rho:g}"] = max(0.0, -float(values[0]))
        rates[f"{rho:g}"] = 2 / float(values[-1])
    return {"signs": " or ".join(sorted(signs)), "different": len(signs), "growth": growth, "rate": rates}


def minimum(function: Callable[[Tensor], Tensor], point: Tensor, steps: int) -> Tensor:
    """Point where descent ends."""
    leaf = point.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([leaf], max_iter=steps, tolerance_grad=1e-12, tolerance_change=0.0, history_size=30)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(leaf)
        value.backward()
        return value

    for _ in range(1 if steps < 100 else 10):
        optimizer.step(closure)
    return leaf.detach()
