"""A codebook: the vectors of a bank of prototypes, their sizes, and how they are set, resized and loaded."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least
from ddcl_lightning._utils.distributed import inform
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.functional._common import check_code_range, check_mask, mark_padding, require_floating, zero_padding
from ddcl_lightning.nn.guarded_state import FINITE, FLAG, GuardedState, Rules, running_dtype


class Codebook(GuardedState):
    """K vectors for each of H heads; it takes the number of vectors of the state that it loads.

    Args:
        num_prototypes: K, vectors per head, at least 1.
        dim: d, dimension of one head's vectors.
        num_heads: H; tokens carry ``H * d`` values.
        trainable: Whether the vectors are a parameter; if not, they are a buffer, in float32 or wider, that the owner
            moves.

    Attributes:
        prototypes: Parameter or buffer ``(H, K, d)``.
        marker: Parameter whose gradient tells of backward passes through the vectors, and which is frozen where they
            are: the vectors themselves, or a zero beside the buffer, which no optimizer moves and no state holds.
        initialized: Buffer, saved with the state: 1 if the vectors were set from data, else 0.

    Raises:
        ValueError: If a size is below 1.
    """

    prototypes: Tensor
    initialized: Tensor
    state_rules: ClassVar[Rules] = {"prototypes": FINITE, "initialized": FLAG}

    def __init__(self, num_prototypes: int, dim: int, num_heads: int = 1, *, trainable: bool = True) -> None:
        super().__init__()
        require_at_least(1, num_prototypes=num_prototypes, dim=dim, num_heads=num_heads)
        self.num_prototypes, self.dim, self.num_heads = num_prototypes, dim, num_heads
        values = torch.randn(num_heads, num_prototypes, dim)
        if trainable:
            self.prototypes = nn.Parameter(values)
        else:
            self.register_buffer("prototypes", values.to(running_dtype()))
            self._marker = nn.Parameter(torch.zeros((), dtype=running_dtype()))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.float32))

    @property
    def marker(self) -> nn.Parameter:
        """Parameter whose gradient tells of backward passes, see the attributes."""
        prototypes = self.prototypes
        return prototypes if isinstance(prototypes, nn.Parameter) else self._marker

    @property
    def is_trainable(self) -> bool:
        """True if the vectors are a parameter."""
        return "_marker" not in self._parameters

    def split_heads(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(*, H * d)`` as ``(H, N, d)`` and mask ``(*)`` as ``(H, N)``, the form of the functional API."""
        width = self.num_heads * self.dim
        require_floating(tokens)
        if tokens.shape[-1] != width:
            raise ValueError(
                f"tokens must have last dimension num_heads * dim = {width}; got shape {tuple(tokens.shape)}. "
                "Project them, or build the bank for their dimension."
            )
        check_mask(tokens, mask)
        heads = tokens.reshape(-1, self.num_heads, self.dim).transpose(0, 1)
        flat_mask = None if mask is None else mask.reshape(1, -1).expand(self.num_heads, -1)
        return heads, flat_mask

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Index of the nearest prototype per token and head, ``(*, H)`` int64, for tokens ``(*, H * d)``.

        Where the mask ``(*)`` is False the index is -1.
        """
        heads, _ = self.split_heads(tokens, mask)
        codes = nearest_prototype(heads, self.prototypes).transpose(0, 1).reshape(*tokens.shape[:-1], self.num_heads)
        return mark_padding(codes, mask)

    def decode(self, codes: Tensor) -> Tensor:
        """Prototypes of indices ``(*, H)``, heads side by side, ``(*, H * d)``; zero for -1, the code of padding."""
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise TypeError(f"codes must be integers; got {codes.dtype}. Pass those of encode.")
        check_code_range("codes", codes, f"K = {self.num_prototypes}", self.num_prototypes)
        return self.vectors(codes)

    def vectors(self, codes: Tensor) -> Tensor:
        """Prototypes of indices ``(*, H)`` as :meth:`decode` gives them, for indices of the bank's own, unchecked."""
        heads = torch.arange(self.num_heads, device=codes.device)
        return zero_padding(self.prototypes[heads, codes.clamp(min=0)], codes >= 0).flatten(-2)

    @torch.no_grad()
    def set_prototypes(self, prototypes: Tensor) -> None:
        """Copy ``(H, K, d)`` values in and mark the bank initialized."""
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"prototypes must have shape {tuple(self.prototypes.shape)}; got {tuple(prototypes.shape)}. Build the "
                "bank for their sizes, or use resize for another number of them."
            )
        if not bool(torch.isfinite(prototypes).all()):
            raise ValueError("prototypes must be finite; got NaN or infinity. Leave out what made them so.")
        self.prototypes.copy_(prototypes)
        self.initialized.fill_(1.0)

    @torch.no_grad()
    def resize(self, prototypes: Tensor) -> None:
        """Replace the ``(H, K, d)`` values by ``(H, K', d)``; the parameter stays the same object.

        Its gradient is dropped, and the state that an optimizer keeps for it has to follow:
        :func:`~ddcl_lightning.optim.resizing.resize_bank` does both.
        """
        if prototypes.dim() != 3 or prototypes.shape[1] < 1 or prototypes[:, 0].shape != self.prototypes[:, 0].shape:
            raise ValueError(
                f"prototypes must have shape ({self.num_heads}, K, {self.dim}) with K >= 1; got "
                f"{tuple(prototypes.shape)}. Build the bank for their heads and dimension."
            )
        if not self.marker.requires_grad:
            raise ValueError("prototypes are frozen, so their number stays; call requires_grad_(True) first.")
        if not bool(torch.isfinite(prototypes).all()):
            raise ValueError("prototypes must be finite; got NaN or infinity. Leave out what made them so.")
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
        """Resize to the number of prototypes of a state that is about to be loaded."""
        saved = state_dict.get(f"{prefix}prototypes")
        if isinstance(saved, Tensor) and saved.dim() == 3:
            heads, size, dim = saved.shape
            if (heads, dim) == (self.num_heads, self.dim) and size not in (0, self.num_prototypes):
                inform(
                    f"{prefix.rstrip('.') or 'a bank'} was built with {self.num_prototypes} prototypes and loads "
                    f"{size}: it takes their number."
                )
                self._make_room(size)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}_marker", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing_keys: list[str] = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}_marker" in missing_keys:
            missing_keys.remove(f"{prefix}_marker")
            if self._marker.is_meta and not self.prototypes.is_meta:  # a state was assigned to a bank without storage
                zero = self._marker.new_zeros((), device=self.prototypes.device)
                self._marker = nn.Parameter(zero, self._marker.requires_grad)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"num_prototypes={self.num_prototypes}, dim={self.dim}, num_heads={self.num_heads}"
