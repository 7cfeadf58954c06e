"""The token-normalized step of prototypes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.nn.bank import PrototypeBank
from ddcl_lightning.nn.discovery import find_banks
from ddcl_lightning.nn.shared_parameters import follow_alone, release
from ddcl_lightning.nn.step_statistics import StepStatistics
from ddcl_lightning.nn.token_step import check_step, move_prototypes

RATES = ("lr", "relocation_threshold", "load_exponent")
RATE = "lr of TokenNormalized"


class TokenNormalized(Optimizer):
    """Optimizer that moves every prototype towards its own tokens with one time constant, whatever its mass.

    A gradient step moves a prototype in proportion to the mass of tokens assigned to it, so one that the encoder
    leaves behind stops moving: a dead code. Here responsibilities are normalized over *tokens*,
    ``w_kn = softmax_n(ln q_nk)``, and ``p_k <- p_k + lr (sum_n w_kn z_n - p_k)``: the fast subsystem of
    the two time scales taken literally. In log space nothing underflows, so a prototype without mass goes to the
    tokens it is nearest to. Statistics add up over accumulated batches and over processes.

    It reads the tokens from the forward pass, not the gradients: a task or repulsion loss does not reach
    prototypes through it. But it counts tokens as gradients count: those of calls that a backward pass has gone
    through since the last step or ``zero_grad``, see
    :class:`~ddcl_lightning.nn.step_statistics.StepStatistics`. ``torch.autograd.grad`` through a bank
    (a saliency, an adversarial step) is a backward pass as well: put the bank into evaluation mode for it. Frozen
    prototypes (``requires_grad_(False)``) stay where they are. Prototypes of half precision move by a copy in float32,
    or small steps would be rounded away.

    Alive is not yet useful: a prototype between others can keep a few tokens for ever while another has far too many.
    ``relocation_threshold`` moves such prototypes to where they are needed, as the enhanced LBG algorithm does
    (Patane and Russo 2001): one whose cell bears less than that share of the mean load goes to a token of a cell that
    bears more than 1.5 times the mean, unless its own tokens would lose more. At most K / 64 move per step, at least
    one may. The load of a cell with n tokens and the distortion D is ``n^b D^(1 - b)`` with ``b = load_exponent``.

    Args:
        params: Prototype parameters of banks.
        lr: Step size, the share of the distance to the means that is covered per step, in (0, 1].
        relocation_threshold: Share of the mean load in [0, 1) under which a prototype moves elsewhere; 0 never moves
            any. 0.5 suits codebooks; leave it at 0 where prototypes have to keep their meaning.
        load_exponent: What prototypes share evenly, in [0, 1]: 0 the distortion (least error in the tokens' space, as
            in the enhanced LBG algorithm), 1 the tokens (highest perplexity), or a mixture. Without relocation it does
            nothing.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: At a step without a forward pass in training mode since the last, or without ``watch``; at the
            step of any other optimizer that has one of the prototypes too.
    """

    @typed
    def __init__(
        self, params: Any, lr: float = 0.05, relocation_threshold: float = 0.0, load_exponent: float = 0.75
    ) -> None:
        check_step(RATE, lr, relocation_threshold, load_exponent)
        super().__init__(
            params, {"lr": lr, "relocation_threshold": relocation_threshold, "load_exponent": load_exponent}
        )
        self._statistics: StepStatistics | None = None
        self._banks: dict[str, PrototypeBank] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy, pickled or deep, follows nothing until it is told what.
        self.__dict__.setdefault("_statistics", None)
        self.__dict__.setdefault("_banks", {})

    def watch(self, module: nn.Module) -> "TokenNormalized":
        """Follow the banks in ``module`` whose prototypes are optimized here, in place of another; returns self.

        Raises:
            ValueError: If a parameter is not the prototypes of a bank, or the bank moves them itself.
        """
        own = {id(p) for group in self.param_groups for p in group["params"]}
        banks = {name: bank for name, bank in find_banks(module).items() if id(bank.prototypes) in own}
        if len(banks) < len(own):
            raise ValueError(
                f"TokenNormalized optimizes {len(own)} parameters but only {len(banks)} of them are prototypes "
                f"of a bank in {type(module).__name__}. Give it prototype parameters only."
            )
        moving = [name for name, bank in banks.items() if not bank.is_trainable]
        if moving:
            raise ValueError(
                f"prototypes must be a parameter for TokenNormalized to move them; bank {moving[0]!r} of "
                f"{type(module).__name__} moves them itself. Build its quantizer with code_update='optimizer', or "
                "leave TokenNormalized out."
            )
        self.close()
        self._banks = banks
        follow_alone(self, {f"{name}.prototypes".lstrip("."): bank.prototypes for name, bank in banks.items()})
        self._statistics = StepStatistics(banks, self._relocates)
        return self

    def close(self) -> None:
        """Stop following the banks, so that another optimizer may have their prototypes."""
        release(self)
        if self._statistics is not None:
            self._statistics.close()
        self._statistics, self._banks = None, {}

    def _relocates(self) -> bool:
        return any(group["relocation_threshold"] > 0 for group in self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load rates and state, after a check of their values.

        Raises:
            ValueError: If a value is out of its range.
        """
        for group in state_dict["param_groups"]:
            # torch adds defaults of its own to an optimizer that was loaded or copied.
            check_step(RATE, *(group.get(name, self.defaults[name]) for name in RATES))
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        memory = [(p, state_dict["state"].get(key, {})) for p, key in zip(parameters, keys, strict=False)]
        for _, held in memory:
            for name, value in held.items():
                clean = value.isfinite() & ((value >= 0) if name == "cells" else torch.tensor(True))
                if not bool(clean.all()):
                    raise ValueError(
                        f"{name!r} in the state of TokenNormalized must be finite{' and >= 0' * (name == 'cells')}; "
                        f"got {float(value[~clean][0])}. The state is damaged: load another."
                    )
        super().load_state_dict(state_dict)
        for parameter, held in memory:  # which torch has rounded to the parameter's precision
            for name, value in held.items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and the statistics of tokens since the last step with them."""
        super().zero_grad(set_to_none)
        if self._statistics is not None:
            for bank in self._banks.values():
                self._statistics.drop(bank.prototypes)

    def forget(self, prototypes: Tensor) -> None:
        """Drop the statistics of a bank since the last step; a step without new ones leaves it as it is."""
        if self._statistics is not None:
            self._statistics.drop(prototypes, on_purpose=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the prototypes by the statistics of their tokens."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._statistics is None:
            raise RuntimeError("TokenNormalized sees no tokens. Call optimizer.watch(module) after creating it.")
        for group in self.param_groups:
            if not 0 <= group["lr"] <= 1:  # it was set since
                raise ValueError(
                    f"lr of TokenNormalized must be in [0, 1], a step size; a group has {group['lr']}. Correct "
                    "what sets it, a schedule perhaps."
                )
            for prototypes in group["params"]:
                statistics = self._statistics.take(prototypes)
                if statistics is None:
                    continue
                precise = self._precise(prototypes)
                loads = move_prototypes(
                    precise,
                    statistics,
                    self.state[prototypes].get("cells"),
                    step_size=group["lr"],
                    relocation_threshold=group["relocation_threshold"],
                    load_exponent=group["load_exponent"],
                )
                if loads is not None:
                    self.state[prototypes]["cells"] = loads
                prototypes.copy_(precise)
        return loss

    def _precise(self, prototypes: Tensor) -> Tensor:
        """Prototypes in float32 or wider."""
        if prototypes.dtype.itemsize >= 4:
            return prototypes
        state = self.state[prototypes]
        rounded = prototypes.float()
        kept = state.get("precise", rounded)
        # Somebody else may have moved them since.
        precise = torch.where(kept.to(prototypes.dtype) == prototypes, kept, rounded)
        state["precise"] = precise
        return precise
