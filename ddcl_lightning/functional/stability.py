"""What a step of prototypes must lower, and how large it may be.

With assignments held constant in the backward pass, the gradient of ``L_q`` is that of the free energy
``F = L_q - T H = -T mean_n ln sum_k exp(-||z_n - p_k||^2 / T)``: descent lowers F, and L_q may rise. With the full
gradient descent lowers L_q, and F may rise. ``docs/stability.md`` derives both, and shows what was measured.
"""

import torch
from torch import Tensor


def largest_stable_rate(mass: Tensor) -> Tensor:
    """Largest rate of plain gradient steps on ``L_q`` with detached assignments that is stable, ``1 / max_k mass_k``.

    The gradient with respect to prototype k is ``2 mass_k (p_k - m_k)``, ``m_k`` the mean of its tokens: a step at rate
    r multiplies the distance to ``m_k`` by ``1 - 2 r mass_k``. Held at these assignments, F is a bowl that lies above F
    and touches it, so a step at up to this rate never raises F on its own batch, wherever it starts. It is a lower
    bound: the limit at an equilibrium is ``2 / lambda_max`` of the Hessian of F, at or above it. For the full gradient
    it is no bound, since assignments respond (the limit can lie on either side); nor is it one for a step with momentum
    or with Adam. A loss that takes ``L_q`` with weight w divides it by w.

    Args:
        mass: Mean soft assignment of each prototype, ``(..., K)``, as
            :func:`~ddcl_lightning.functional.assignment_statistics` returns it.

    Returns:
        ``(...)``, in the dtype of the mass.

    Raises:
        ValueError: If there is no prototype, a mass is negative, or all of a bank are zero.
    """
    if mass.dim() == 0 or mass.shape[-1] == 0:
        raise ValueError(
            f"mass must hold one number for each of at least one prototype, (..., K); got shape {tuple(mass.shape)}. "
            "Pass assignment_statistics(...).mass."
        )
    largest = mass.amax(-1)
    if not bool((mass >= 0).all() & (largest > 0).all()):
        raise ValueError(
            "mass must be >= 0, and > 0 for some prototype; got values from "
            f"{float(mass.min()):.3g} to {float(mass.max()):.3g}. Pass assignment_statistics(...).mass."
        )
    return 1.0 / largest


def free_energy(loss: Tensor, temperature: float | Tensor, entropy: Tensor) -> Tensor:
    """Free energy ``F = L_q - T H``, in units of squared distance.

    Args:
        loss: ``L_q``, ``(...)``.
        temperature: ``T > 0`` in units of squared distance; a float or ``(...)``.
        entropy: ``H``, the mean over tokens of the entropy of their assignments in nats, ``(...)``; not the entropy of
            the mean assignment, which quantizers return.

    Returns:
        ``(...)``; it may be negative.
    """
    return loss - temperature * entropy


def lyapunov(loss: Tensor, temperature: float | Tensor, entropy: Tensor, *, detach_assignments: bool) -> Tensor:
    """Function that gradient descent on ``L_q`` lowers: ``L_q`` itself, or ``L_q - T H`` with detached assignments.

    It holds at constant T and for steps small enough. Theorem 2 of the paper holds for the second only.

    Args:
        loss: ``L_q``, ``(...)``.
        temperature: ``T > 0`` in units of squared distance; a float or ``(...)``.
        entropy: ``H``, see :func:`free_energy`.
        detach_assignments: The bank's own setting.

    Returns:
        ``(...)``.
    """
    return free_energy(loss, temperature, entropy) if detach_assignments else loss


def descent_violation(before: Tensor, after: Tensor, scale: Tensor, tolerance: float = 1e-6) -> Tensor:
    """True where a step has raised what it descends on its own batch, or made it NaN.

    Args:
        before: Values of :func:`lyapunov` on a batch before the step, ``(...)``.
        after: Those of the same tokens and T after it, ``(...)``.
        scale: What the rise is relative to, > 0, ``(...)``: ``L_q`` before the step. F itself may be zero.
        tolerance: Largest relative rise, finite and >= 0.

    Returns:
        ``(...)`` boolean.

    Raises:
        ValueError: If the tolerance is negative or not finite.
    """
    if not 0 <= tolerance < float("inf"):
        raise ValueError(
            f"tolerance must be finite and >= 0, relative to L_q; got {tolerance}. Leave it out for the default."
        )
    # A NaN is a violation.
    return torch.logical_not(after - before <= tolerance * scale)
