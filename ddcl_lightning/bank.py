"""The bank of prototypes: the one stateful piece that every head, and every callback, is about."""

from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ddcl_lightning.arguments import typed
from ddcl_lightning.critical import RunningCriticalTemperature
from ddcl_lightning.distributed import log_sum_over_processes, token_weight
from ddcl_lightning.functional import (
    BankOutput,
    Decomposition,
    assign_codes,
    critical_factor,
    nearest_prototype,
    prototype_attention,
    prototype_attention_reference,
    prototype_slots,
    quantize,
    sample_codes,
)
from ddcl_lightning.functional._common import require_tokens
from ddcl_lightning.guarded_state import FINITE, FLAG, POSITIVE, GuardedState, Rules, keep_unless, running_dtype
from ddcl_lightning.shared_parameters import note_prototypes

TemperatureUnit = Literal["absolute", "critical"]


class PrototypeBank(GuardedState):
    """K prototypes per head, the temperature that softens the assignment to them, and nothing else.

    Callbacks look for modules of this class, so whatever is built on one can be annealed, initialised, checked
    and watched. A bank takes the number of prototypes of the state that it loads.

    Args:
        num_prototypes: K, prototypes per head, at least 1.
        dim: d, dimension of one head's prototypes.
        num_heads: H, independent banks; tokens carry ``H * d`` values.
        temperature: Initial T > 0 for all heads.
        detach_assignments: Hold assignments constant in the backward pass, the paper's stop-gradient form (eq. 10).
        temperature_unit: ``"absolute"``: T is a squared distance. ``"critical"``: T is a fraction of the critical
            temperature of the tokens, which is followed from batch to batch while training: for encoders whose tokens
            change their scale (those trained from scratch).

    Attributes:
        prototypes: Parameter ``(H, K, d)``.
        temperature: Buffer ``(H,)``, T in units of squared distance, saved with the state.
        fraction: Buffer ``(H,)``, T as a fraction of the critical one, or None for absolute temperatures.
        initialized: Buffer, saved with the state: 1 if the prototypes were set from data, else 0.

    Raises:
        ValueError: If a size is below 1 or the temperature is not positive.
    """

    temperature: Tensor
    fraction: Tensor | None
    initialized: Tensor
    state_rules: ClassVar[Rules] = {
        "prototypes": FINITE,
        "temperature": POSITIVE,
        "fraction": POSITIVE,
        "initialized": FLAG,
    }

    @typed
    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        *,
        num_heads: int = 1,
        temperature: float = 1.0,
        detach_assignments: bool = False,
        temperature_unit: TemperatureUnit = "absolute",
    ) -> None:
        super().__init__()
        for name, value in (("num_prototypes", num_prototypes), ("dim", dim), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self.num_prototypes, self.dim, self.num_heads = num_prototypes, dim, num_heads
        self.detach_assignments = detach_assignments
        self.prototypes = nn.Parameter(torch.randn(num_heads, num_prototypes, dim))
        self.register_buffer("temperature", torch.ones(num_heads, dtype=running_dtype()))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.float32))
        if temperature_unit not in get_args(TemperatureUnit):
            raise ValueError(f"temperature_unit must be one of {get_args(TemperatureUnit)}; got {temperature_unit!r}.")
        relative = temperature_unit == "critical"
        self.critical = RunningCriticalTemperature(num_heads, dim) if relative else None
        self.register_buffer("fraction", torch.ones(num_heads, dtype=running_dtype()) if relative else None)
        if relative:
            self.set_fraction(temperature)
        else:
            self.set_temperature(temperature)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = False,
        need_codes: bool = False,
        detach_centroids: bool = False,
        detach_prototypes: bool = False,
    ) -> BankOutput:
        """Assign tokens and return their soft centroids.

        Args:
            tokens: ``(*, H * d)``, usually ``(B, T, H * d)``.
            mask: ``(*)`` boolean, True for valid tokens.
            need_weights: Return the assignments too; this stores them, where the default call does not.
            need_codes: Return hard codes, token means and the entropy of the mean assignment too.
            detach_centroids: The centroids and, of the terms, ``L_OLS`` and ``V`` need no gradient, as with a
                straight-through estimator; codes then come at no extra cost, see
                :func:`~ddcl_lightning.functional.quantize`.
            detach_prototypes: Hold the prototypes constant: gradients reach the tokens only.

        Returns:
            Centroids ``(*, H * d)``, terms ``(H,)`` each (in training on several processes scaled so that their mean
            over processes is one over all valid tokens), weights ``(B, H, T, K)`` (``(H, N, K)`` for tokens
            ``(N, H * d)``) or None. With ``need_codes`` also codes ``(*, H)`` int64, means, and as cost the entropy
            ``(H,)`` in nats of the mean assignment, with its gradient: in training over all processes, in evaluation
            over the tokens of this one.

        Raises:
            ValueError: If a shape does not fit, or (in eager mode on a CPU, where looking costs nothing) if no token
                is valid or the terms are not finite; the message says which input is to blame.
        """
        heads, flat_mask = self.split_heads(tokens, mask)
        require_tokens(tokens)
        prototypes = self.prototypes.detach() if detach_prototypes else self.prototypes
        if self.training and not torch.compiler.is_compiling():
            note_prototypes(self.prototypes)
        if self.critical is not None and self.training:
            self._follow(self.critical(heads.detach(), flat_mask))
        # What a process evaluates on its own must not wait for the others.
        total = log_sum_over_processes if self.training else Tensor.detach
        attend = prototype_attention_reference if need_weights else prototype_attention
        # A copy, because a schedule may set the next temperature before the backward pass reads this one.
        temperature = self.temperature.clone()
        codes, means, costs = None, None, None
        one_look = detach_centroids or not torch.is_grad_enabled()
        if need_codes and one_look and not need_weights and not torch.compiler.is_compiling():
            output = quantize(
                heads,
                prototypes,
                temperature,
                flat_mask,
                detach_assignments=self.detach_assignments,
                total=total,
            )
            assert output.codes is not None
            codes, means = output.codes, output.means
        else:
            if need_codes:
                codes, means = assign_codes(heads.detach(), prototypes.detach(), temperature, flat_mask)
                # The entropy of a mean is linear in what is averaged, to first order: -ln of the mean is its gradient.
                log_mass = total(means.log_mass)
                costs = log_mass.logsumexp(-1, keepdim=True) - log_mass
            output = attend(
                heads, prototypes, temperature, flat_mask, detach_assignments=self.detach_assignments, costs=costs
            )
        if not torch.compiler.is_compiling() and output.terms.loss.device.type == "cpu":
            self._require_finite(output, heads, flat_mask)
        if self.training and mask is not None:
            output = _scaled(output, token_weight(mask))
        lead = tokens.shape[:-1]
        weights = output.weights
        if weights is not None:
            weights = weights.reshape(self.num_heads, *lead, -1).movedim(0, max(len(lead) - 1, 0))
        centroids = output.centroids.transpose(0, 1).reshape(tokens.shape)
        if codes is not None:
            codes = codes.transpose(0, 1).reshape(*lead, self.num_heads)
        return output._replace(centroids=centroids, weights=weights, codes=codes, means=means)

    def split_heads(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(*, H * d)`` as ``(H, N, d)`` and mask ``(*)`` as ``(H, N)``, the form of the functional API."""
        width = self.num_heads * self.dim
        if tokens.shape[-1] != width:
            raise ValueError(
                f"tokens must have last dimension num_heads * dim = {width}; got shape {tuple(tokens.shape)}. "
                "Project them, or build the bank for their dimension."
            )
        if mask is not None and mask.shape != tokens.shape[:-1]:
            raise ValueError(
                f"mask must have the shape of tokens without the last dimension, {tuple(tokens.shape[:-1])}; "
                f"got {tuple(mask.shape)}."
            )
        heads = tokens.reshape(-1, self.num_heads, self.dim).transpose(0, 1)
        flat_mask = None if mask is None else mask.reshape(1, -1).expand(self.num_heads, -1)
        return heads, flat_mask

    def codes(self, tokens: Tensor) -> Tensor:
        """Index of the nearest prototype per token and head, ``(*, H)`` int64, for tokens ``(*, H * d)``."""
        heads, _ = self.split_heads(tokens)
        return nearest_prototype(heads, self.prototypes).transpose(0, 1).reshape(*tokens.shape[:-1], self.num_heads)

    def look_up(self, codes: Tensor) -> Tensor:
        """Prototypes of indices ``(*, H)``, heads side by side, ``(*, H * d)``."""
        heads = torch.arange(self.num_heads, device=codes.device)
        return self.prototypes[heads, codes].flatten(-2)

    def sample(self, tokens: Tensor) -> Tensor:
        """A prototype per token and head, drawn from the assignments: indices ``(*, H)`` int64, for ``(*, H * d)``."""
        heads, _ = self.split_heads(tokens)
        drawn = sample_codes(heads, self.prototypes, self.temperature)
        return drawn.transpose(0, 1).reshape(*tokens.shape[:-1], self.num_heads)

    def slots(self, tokens: Tensor, mask: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        """One summary of every sample per prototype, see :func:`~ddcl_lightning.functional.prototype_slots`.

        Args:
            tokens: ``(B, T, H * d)``.
            mask: ``(B, T)`` boolean, True for valid tokens.
            values: ``(B, T, E)``, what to average in every head, zero at padding; by default the head's own tokens.

        Returns:
            ``(B, H, K, d)``, or ``(B, H, K, E)`` of the values.
        """
        self.split_heads(tokens, mask)  # for its checks
        heads = torch.unflatten(tokens, -1, (self.num_heads, self.dim)).transpose(1, 2)
        heads_mask = None if mask is None else mask.unsqueeze(1).expand(heads.shape[:-1])
        found = prototype_slots(
            heads,
            self.prototypes,
            self.temperature.clone(),
            heads_mask,
            detach_assignments=self.detach_assignments,
            values=None if values is None else values.unsqueeze(1),
        )
        return found.to(tokens.dtype)

    @torch.no_grad()
    def set_prototypes(self, prototypes: Tensor) -> None:
        """Copy ``(H, K, d)`` values in and mark the bank initialised."""
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"prototypes must have shape {tuple(self.prototypes.shape)}; got {tuple(prototypes.shape)}."
            )
        if not bool(torch.isfinite(prototypes).all()):
            raise ValueError("prototypes must be finite; got NaN or infinity.")
        self.prototypes.copy_(prototypes)
        self.initialized.fill_(1.0)

    @torch.no_grad()
    def resize(self, prototypes: Tensor) -> None:
        """Take ``(H, K', d)`` values in the place of the ``(H, K, d)``; the parameter stays the same object.

        Its gradient is dropped, and the state that an optimizer keeps for it has to follow:
        :func:`~ddcl_lightning.resizing.resize_bank` does both.
        """
        if prototypes.dim() != 3 or prototypes.shape[1] < 1 or prototypes[:, 0].shape != self.prototypes[:, 0].shape:
            raise ValueError(
                f"prototypes must have shape ({self.num_heads}, K, {self.dim}) with K >= 1; got "
                f"{tuple(prototypes.shape)}."
            )
        if not self.prototypes.requires_grad:
            raise ValueError("prototypes are frozen, so their number stays; call requires_grad_(True) first.")
        if not bool(torch.isfinite(prototypes).all()):
            raise ValueError("prototypes must be finite; got NaN or infinity.")
        self._make_room(prototypes.shape[1])
        self.prototypes.copy_(prototypes)

    def _make_room(self, num_prototypes: int) -> None:
        self.prototypes.grad = None
        room = self.prototypes.data.new_zeros(self.num_heads, num_prototypes, self.dim)
        # While a graph of an earlier call lives, autograd keeps the parameter's old shape; it drops it with the dtype.
        self.prototypes.data = room.to(torch.bfloat16 if room.dtype == torch.float32 else torch.float32)
        self.prototypes.data = room
        self.num_prototypes = num_prototypes

    def fit_to_state(self, prefix: str, state_dict: dict[str, Any]) -> None:
        """Make room for a bank that has grown since it was built."""
        saved = state_dict.get(f"{prefix}prototypes")
        if isinstance(saved, Tensor) and saved.dim() == 3:
            heads, size, dim = saved.shape
            if (heads, dim) == (self.num_heads, self.dim) and size not in (0, self.num_prototypes):
                rank_zero_info(
                    f"{prefix.rstrip('.') or 'a bank'} was built with {self.num_prototypes} prototypes and loads "
                    f"{size}: it takes their number."
                )
                self._make_room(size)

    @torch.no_grad()
    def set_temperature(self, temperature: float | Tensor) -> None:
        """Set T for all heads (a float) or per head (``(H,)``), in units of squared distance."""
        if self.fraction is not None:
            raise ValueError(
                "temperature of this bank follows its tokens (temperature_unit='critical'); set the fraction of the "
                "critical temperature with set_fraction."
            )
        self._fill(self.temperature, "temperature", "in units of squared distance", temperature)

    @torch.no_grad()
    def set_fraction(self, fraction: float | Tensor) -> None:
        """Set T as a fraction of the critical temperature, for all heads (a float) or per head (``(H,)``)."""
        if self.fraction is None or self.critical is None:
            raise ValueError(
                "fraction belongs to banks with temperature_unit='critical'; this one takes set_temperature, in units "
                "of squared distance."
            )
        self._fill(self.fraction, "fraction", "a fraction of the critical temperature", fraction)
        self._follow(self.critical.lambda_max)

    def _fill(self, buffer: Tensor, name: str, unit: str, given: float | Tensor) -> None:
        value = torch.as_tensor(given, dtype=buffer.dtype, device=buffer.device)
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != self.num_heads):
            raise ValueError(
                f"{name} must be one value or one per head, ({self.num_heads},); got {tuple(value.shape)}."
            )
        if not bool((value > 0).all() and torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite and > 0, {unit}; got {value.tolist()}.")
        buffer.copy_(value.expand_as(buffer))

    @torch.no_grad()
    def _follow(self, lambda_max: Tensor) -> None:
        """Set T from the fraction; tokens without variance have no critical temperature and leave it as it is."""
        assert self.fraction is not None
        latest = self.fraction * critical_factor(self.detach_assignments) * lambda_max
        latest = latest.to(self.temperature.dtype)
        keep_unless((latest > 0) & torch.isfinite(latest), self.temperature, latest)

    def _require_finite(self, output: BankOutput, tokens: Tensor, mask: Tensor | None) -> None:
        if bool(torch.isfinite(output.terms.loss).all()):
            return
        if mask is not None and not bool(mask.any()):
            raise ValueError(
                "mask leaves no valid token in the batch, so the loss has no mean. Drop empty samples from the data."
            )
        valid = tokens if mask is None else tokens[mask]
        if not bool(torch.isfinite(valid).all()):
            raise ValueError(
                "tokens must be finite; got NaN or infinity among the valid ones. Check the data, or lower rho or clip "
                "gradients if the encoder diverged."
            )
        if not bool(torch.isfinite(self.prototypes).all()):
            raise ValueError(
                "prototypes became NaN or infinite. Lower lr_prototypes, clip gradients, or restart from a checkpoint."
            )
        raise ValueError(
            f"the loss terms overflow {output.terms.loss.dtype} (temperature {self.temperature.tolist()}, largest "
            f"token entry {float(valid.abs().max()):.3g}). Standardise the tokens or raise the temperature."
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"num_prototypes={self.num_prototypes}, dim={self.dim}, num_heads={self.num_heads}"


def _scaled(output: BankOutput, scale: Tensor | float) -> BankOutput:
    """Terms and cost as this process's part in a mean over processes."""
    if not isinstance(scale, Tensor):
        return output
    terms = Decomposition(*((term * scale).to(term.dtype) for term in output.terms))
    cost = None if output.cost is None else (output.cost * scale).to(output.cost.dtype)
    return output._replace(terms=terms, cost=cost, scale=scale)
