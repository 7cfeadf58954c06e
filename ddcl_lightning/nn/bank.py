"""The bank of prototypes, which heads are built on and callbacks find."""

from typing import Any

import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.distributed import from_first_process, log_sum_over_processes, token_weight
from ddcl_lightning.functional import (
    BankOutput,
    Decomposition,
    assign_codes,
    prototype_attention,
    prototype_attention_reference,
    quantize,
    sample_codes,
)
from ddcl_lightning.functional._common import accumulation_dtype, require_tokens
from ddcl_lightning.functional.assignment import log_assign
from ddcl_lightning.nn.codebook import Codebook
from ddcl_lightning.nn.initialization import InitMethod, initial_prototypes
from ddcl_lightning.nn.observer import ObservedModule
from ddcl_lightning.nn.shared_parameters import note_prototypes
from ddcl_lightning.nn.temperature import DEFAULT_TEMPERATURE, BankTemperature, Temperature


class PrototypeBank(Codebook, ObservedModule):
    """Bank of K prototypes per head with the temperature of the assignments to them.

    Callbacks find modules of this class, so that every network with a bank inside can be annealed, initialized,
    checked and monitored. A bank takes the number of prototypes of the state that it loads.

    Args:
        num_prototypes: K, prototypes per head, at least 1.
        dim: d, dimension of one head's prototypes.
        num_heads: H, independent banks; tokens carry ``H * d`` values.
        temperature: Softness of the assignments: a number > 0 is a fraction of the critical temperature of the tokens,
            for all heads or a list with one per head; other units by :class:`~ddcl_lightning.Temperature`. All calls
            between two steps of an optimizer see one T; in a loop without optimizers, :meth:`settle` stands for them.
        detach_assignments: Hold assignments constant in the backward pass, the paper's stop-gradient form (eq. 10).
        measure_variance: Follow the variance of the tokens for temperatures that need none too.
        trainable: Whether prototypes are a parameter, or else a buffer, of the owner.

    Attributes:
        prototypes: Parameter ``(H, K, d)``, or a buffer.
        temperature_state: The :class:`~ddcl_lightning.nn.temperature.BankTemperature` that owns T.
        initialized: Buffer, saved with the state: 1 if the prototypes were set from data, else 0.

    Raises:
        ValueError: If a size is below 1 or the temperature is not positive.
    """

    @typed
    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        *,
        num_heads: int = 1,
        temperature: float | list[float] | Temperature = DEFAULT_TEMPERATURE,
        detach_assignments: bool = False,
        measure_variance: bool = False,
        trainable: bool = True,
    ) -> None:
        super().__init__(num_prototypes, dim, num_heads, trainable=trainable)
        self.detach_assignments = detach_assignments
        self.temperature_state = BankTemperature(
            Temperature.of(temperature),
            num_heads,
            dim,
            detach_assignments=detach_assignments,
            measure=measure_variance,
        )

    def forward(self, tokens: Tensor, mask: Tensor | None = None, need_weights: bool = False) -> BankOutput:
        """Assign tokens and return their soft centroids.

        Args:
            tokens: ``(*, H * d)``, usually ``(B, T, H * d)``.
            mask: ``(*)`` boolean, True for valid tokens.
            need_weights: Return the assignments too; this stores them, where the default call does not.

        Returns:
            Centroids ``(*, H * d)``, terms ``(H,)`` each (in training on several processes scaled so that their mean
            over processes is one over all valid tokens), weights ``(B, H, T, K)`` (``(H, N, K)`` for tokens
            ``(N, H * d)``) or None.

        Raises:
            ValueError: If a shape does not fit, or (in eager mode on a CPU, where the check costs nothing) if no token
                is valid or the terms are not finite; the message names the input that is wrong.
        """
        heads, flat_mask = self._begin(tokens, mask)
        attend = prototype_attention_reference if need_weights else prototype_attention
        output = attend(
            heads, self.prototypes, self.temperature.clone(), flat_mask, detach_assignments=self.detach_assignments
        )
        return self._end(tokens, mask, heads, flat_mask, output)

    def quantize(self, tokens: Tensor, mask: Tensor | None = None, *, straight_through: bool = True) -> BankOutput:
        """Assign tokens to hard codes, with the losses that a codebook learns from.

        In evaluation mode gradients reach the tokens only: the codebook is held constant.

        Args:
            tokens: ``(*, H * d)``.
            mask: ``(*)`` boolean, True for valid tokens.
            straight_through: The centroids and, of the terms, ``L_OLS`` and ``V`` need no gradient; codes then come at
                no extra cost, see :func:`~ddcl_lightning.functional.quantize`. Always so in evaluation mode.

        Returns:
            As :meth:`forward` returns it, with codes ``(*, H)`` int64, -1 at padding, token means, and the entropy
            ``(H,)`` in nats of the mean assignment, with its gradient: in training over all processes, in evaluation
            over the tokens of this one.

        Raises:
            ValueError: As :meth:`forward`.
        """
        heads, flat_mask = self._begin(tokens, mask)
        prototypes = self.prototypes if self.training else self.prototypes.detach()
        # Evaluation of one process alone must not wait for the others.
        total = log_sum_over_processes if self.training else Tensor.detach
        temperature = self.temperature.clone()
        fused = straight_through or not self.training or not torch.is_grad_enabled()
        if fused and not torch.compiler.is_compiling():
            output = quantize(
                heads, prototypes, temperature, flat_mask, detach_assignments=self.detach_assignments, total=total
            )
        else:
            codes, statistics = assign_codes(heads.detach(), prototypes.detach(), temperature, flat_mask)
            # The entropy of a mean is linear in what is averaged, to first order: -ln of the mean is its gradient.
            log_mass = total(statistics.log_mass)
            output = prototype_attention(
                heads,
                prototypes,
                temperature,
                flat_mask,
                detach_assignments=self.detach_assignments,
                surprisal=log_mass.logsumexp(-1, keepdim=True) - log_mass,
            )
            output = output.replaced(codes=codes, statistics=statistics)
        return self._end(tokens, mask, heads, flat_mask, output)

    def _begin(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens and mask in the form of the functional API; observers are called before."""
        heads, flat_mask = self.split_heads(tokens, mask)
        require_tokens(tokens)
        for observer in self._active_observers():
            observer.before(self, tokens, mask)
        if self.training:
            if self.is_trainable and not torch.compiler.is_compiling():
                note_prototypes(self.prototypes)
            self._observe(heads, flat_mask)
        return heads, flat_mask

    def _end(
        self, tokens: Tensor, mask: Tensor | None, heads: Tensor, flat_mask: Tensor | None, output: BankOutput
    ) -> BankOutput:
        """The output in the shape of the tokens, after the observers have read or changed it."""
        if not torch.compiler.is_compiling() and output.terms.loss.device.type == "cpu":
            self._require_finite(output, heads, flat_mask)
        if self.training and mask is not None:
            output = _scaled(output, token_weight(mask))
        lead = tokens.shape[:-1]
        weights, codes = output.weights, output.codes
        if weights is not None:
            weights = weights.reshape(self.num_heads, *lead, -1).movedim(0, max(len(lead) - 1, 0))
        if codes is not None:
            codes = codes.transpose(0, 1).reshape(*lead, self.num_heads)
            codes = codes if mask is None else codes.masked_fill(~mask.unsqueeze(-1), -1)
        centroids = output.centroids.transpose(0, 1).reshape(tokens.shape)
        output = output.replaced(centroids=centroids, weights=weights, codes=codes)
        for observer in self._active_observers():
            output = observer.after(self, tokens, mask, output)
        return output

    def _observe(self, heads: Tensor, mask: Tensor | None) -> None:
        """Measure what T is relative to, in training."""
        self.temperature_state.observe(heads, mask, self.prototypes)

    @property
    def temperature(self) -> Tensor:
        """T of every head in units of squared distance, ``(H,)``; set it with :meth:`set_temperature`."""
        return self.temperature_state.current

    def settle(self) -> None:
        """Update T from what was measured since the last step, as the step of an optimizer does."""
        self.temperature_state.settle()

    def set_temperature(self, temperature: float | list[float] | Temperature) -> None:
        """Set the temperature, in the unit that the bank was built with; a number is a fraction of the critical one.

        Raises:
            ValueError: If the unit is another one, the value is not positive, or a list has not one per head.
        """
        self.temperature_state.set(Temperature.of(temperature))

    def sample(self, tokens: Tensor) -> Tensor:
        """A prototype per token and head, drawn from the assignments: indices ``(*, H)`` int64, for ``(*, H * d)``."""
        heads, _ = self.split_heads(tokens)
        drawn = sample_codes(heads, self.prototypes, self.temperature)
        return drawn.transpose(0, 1).reshape(*tokens.shape[:-1], self.num_heads)

    def log_assignments(self, tokens: Tensor) -> Tensor:
        """Logarithms of the assignments, ``(B, H, T, K)``, finite where the assignments underflow.

        Constant in the backward pass with ``detach_assignments``.

        Args:
            tokens: ``(B, T, H * d)``, finite at padding too.
        """
        self.split_heads(tokens)  # for its checks
        heads = torch.unflatten(tokens, -1, (self.num_heads, self.dim)).transpose(1, 2)
        dtype = accumulation_dtype(tokens, self.prototypes)
        with torch.autocast(tokens.device.type, enabled=False):
            logarithms = log_assign(heads.to(dtype), self.prototypes.to(dtype), self.temperature.clone())
        return logarithms.detach() if self.detach_assignments else logarithms

    @torch.no_grad()
    def initialize(
        self,
        tokens: Tensor,
        *,
        method: InitMethod = "kmeans",
        num_restarts: int = 10,
        seed: int = 0,
        progress: bool = False,
        name: str = "a bank",
    ) -> None:
        """Initialize prototypes and T from a sample of tokens.

        Args:
            tokens: ``(*, H * d)``, valid ones only, the same on every process; the first process clusters them.
            method: ``"kmeans"`` or ``"farthest_point"``, see
                :func:`~ddcl_lightning.nn.initialization.initial_prototypes`.
            num_restarts: Runs of k-means per head, at least 1.
            seed: Seed of the method.
            progress: Show a bar over the restarts.
            name: What the bank is called there and in errors.

        Raises:
            ValueError: If a shape does not fit, a token is not finite, or a head has fewer than K distinct ones.
        """
        heads = self.split_heads(tokens)[0]

        def cluster() -> Tensor:
            settings: dict[str, Any] = {"method": method, "num_restarts": num_restarts, "seed": seed}
            settings |= {"progress": progress, "description": f"{method} of {name}"}
            return torch.stack([initial_prototypes(head, self.num_prototypes, **settings) for head in heads])

        clustered = from_first_process(cluster, f"bank {name!r} cannot be initialized")
        self.set_prototypes(clustered.to(self.prototypes))
        self.temperature_state.start(heads, self.prototypes)

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
            f"token entry {float(valid.abs().max()):.3g}). Standardize the tokens or raise the temperature."
        )


def _scaled(output: BankOutput, scale: Tensor | float) -> BankOutput:
    """Terms and entropy as this process's part in a mean over processes."""
    if not isinstance(scale, Tensor):
        return output
    terms = Decomposition(*((term * scale).to(term.dtype) for term in output.terms))
    entropy = None if output.entropy is None else (output.entropy * scale).to(output.entropy.dtype)
    return output.replaced(terms=terms, entropy=entropy, scale=scale)
