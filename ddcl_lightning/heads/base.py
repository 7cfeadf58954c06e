"""The head protocol."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import require_at_least
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.functional._common import check_mask, require_floating, require_tokens
from ddcl_lightning.nn.discovery import find_banks, prototypes_of

AnyHead = TypeVar("AnyHead", bound="Head")


@dataclass(frozen=True)
class ReadoutOutput:
    """Output of a head for ``(B, T, embed_dim)`` tokens.

    Attributes:
        tokens: One vector per token, ``(B, T, *)``.
        pooled: One vector per sample, ``(B, pooled_dim)``.
        loss_terms: Loss terms per level, each ``(H,)``; empty for a head without prototypes.
        assignments: Mean soft assignment of each sample to the prototypes of the last level,
            ``(B, H, K)``; None while training and for a head without prototypes.
        regularization: A scalar that the task adds to its loss as it is (a repulsion, say), or None.
        codes: Hard code of each token in every codebook, ``(B, T, H)`` int64 in [0, ``num_codes``), -1 for padding;
            None for a head without codes.
        signals: Scalars to be logged while training, by name.
        inputs: The backbone's tokens that the head has read, ``(B, T, embed_dim)``; the module fills it.
        mask: Their mask ``(B, T)``, True for valid tokens, or None where all are; likewise.
        token_weights: Weight of each token in the summary of its sample, ``(B, T)``, which sum to 1; None while
            training where nothing needs them, and for a head without.
    """

    tokens: Tensor
    pooled: Tensor
    loss_terms: list[Decomposition] = field(default_factory=list)
    assignments: Tensor | None = None
    regularization: Tensor | None = None
    codes: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Tensor | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None

    def quantization_loss(self) -> Tensor:
        """``L_q`` summed over levels (eq. 17) and heads, a scalar; without the regularization.

        Raises:
            ValueError: If the head has no prototypes.
        """
        if not self.loss_terms:
            raise ValueError(
                "the head returned no loss terms, so there is no quantization loss to train on. Use a head with "
                "prototypes (DDCLReadout), or set the task's quantization_weight to 0."
            )
        return torch.stack([terms.loss.sum() for terms in self.loss_terms]).sum()


class Head(nn.Module, ABC):
    """Turns tokens into a readout. Subclass it, write ``forward``, and set ``pooled_dim`` by the end of ``build``.

    A head that keeps every argument of its ``__init__`` in an attribute of the same name, and calls
    ``super().build(embed_dim)``, can be saved and loaded by ``save_pretrained`` and ``from_pretrained``. A head without
    prototypes is easier as a :class:`~ddcl_lightning.PoolingHead`, one of hard codes as a
    :class:`~ddcl_lightning.Quantizer`.

    Attributes:
        pooled_dim: Dimension of ``pooled``.
        input_dim: Dimension of the tokens that it was built for; None before.
        num_codes: Codes of each codebook, for a head whose readout has ``codes``; None for others.
        num_codebooks: H of the ``codes``.
    """

    pooled_dim: int
    input_dim: int | None = None
    num_codes: int | None = None
    num_codebooks: int = 1

    def __init__(self) -> None:
        super().__init__()  # so that a head without arguments has none, where nn.Module's takes any

    @property
    def token_dim(self) -> int:
        """Dimension of the readout's ``tokens``; that of the input unless a head overrides it.

        Raises:
            RuntimeError: If the head is not built.
        """
        if self.input_dim is None:
            raise RuntimeError(f"{type(self).__name__} is not built, so token_dim is unknown. Call build(embed_dim).")
        return self.input_dim

    def build(self, embed_dim: int) -> None:
        """Create what depends on the backbone's ``embed_dim``; called once, before the optimizers exist."""
        self.input_dim = embed_dim

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        """Read out ``(B, T, embed_dim)`` tokens with mask ``(B, T)``, True for valid tokens."""

    def fixed_bank_size(self) -> str | None:
        """Reason why the number of prototypes must stay as built, or None where nothing depends on it.

        A head whose shapes are free of it overrides this, for :class:`~ddcl_lightning.callbacks.AdaptiveBankSize`.
        """
        return f"{type(self).__name__} does not say that it can change"

    def bound_scale(self) -> None:
        """Bound the scale of the embeddings if the user left the choice open.

        The module calls it when an encoder is trained without a task loss, the case where embeddings shrink.
        """

    def prototype_parameters(self) -> list[nn.Parameter]:
        """Parameters that step at ``lr_prototypes``: by default the prototypes of every bank inside."""
        return prototypes_of(find_banks(self).values())

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Parameters that move the tokens which a bank sees; they step with the encoder, at rho * lr_prototypes.

        Whatever is in neither list belongs to the task and steps at ``lr_task``.
        """
        return []

    def contributions(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor:
        """Exact terms of a linear classifier's logits: what each token adds through each prototype.

        Args:
            tokens: ``(B, T, embed_dim)``.
            mask: ``(B, T)`` boolean, True for valid tokens.
            classifier: Reads ``pooled``.

        Returns:
            ``(B, T, H, K, C)``, whose sum over tokens, heads and prototypes is the logits less the bias.

        Raises:
            ValueError: If a shape does not fit, or ``pooled`` is no sum of such terms.
        """
        raise ValueError(
            f"{type(self).__name__} has no exact contributions: its summary is not a sum over tokens and prototypes. "
            "DDCLReadout has them, and so have the plain means."
        )

    def logits_without(self, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> Tensor | None:
        """Logits of a linear classifier with one prototype taken out, whose tokens go to the others of its head.

        Args:
            tokens: ``(B, T, embed_dim)``.
            mask: ``(B, T)`` boolean, True for valid tokens.
            classifier: Reads ``pooled``.

        Returns:
            ``(B, H, K, C)``, NaN for the only prototype of a head; None from a head that cannot say, as by default.

        Raises:
            ValueError: If a shape does not fit.
        """
        return None

    @property
    def pools_assignments(self) -> bool:
        """True if ``pooled`` is a function of the readout's ``assignments`` alone; a head that is so overrides it."""
        return False

    def num_parameters(self) -> int:
        """Numbers that the head learns or could learn: all its parameters, frozen ones included, and no buffers."""
        return sum(parameter.numel() for parameter in self.parameters())

    # Saving and sharing; see heads/saving.py ---------------------------------------------------------

    def init_args(self) -> dict[str, Any]:
        """Arguments that make this head again, as plain data: by default the attributes of the same names.

        Raises:
            TypeError: If an argument of ``__init__`` is kept nowhere; override the method then.
        """
        from ddcl_lightning.heads import saving

        return saving.stored_arguments(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head into ``folder``: ``config.json`` and ``model.safetensors``.

        Raises:
            ImportError: Without safetensors (``pip install 'ddcl-lightning[hub]'``).
            TypeError: If an argument is kept nowhere or is not plain data.
            ValueError: If the head could not be made again from its arguments.
        """
        from ddcl_lightning.heads import saving

        saving.save(self, folder)

    @classmethod
    def from_pretrained(
        cls: type[AnyHead],
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> AnyHead:
        """A saved head, built and in evaluation mode; ``Head.from_pretrained`` takes any class that was imported.

        Args:
            name_or_folder: A folder, or a repository ``"user/name"`` of the Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            token: Access token; by default the one that ``hf auth login`` stored.
            cache_dir: Where downloads are kept.
            local_files_only: Use earlier downloads only.

        Raises:
            ImportError: Without safetensors, or huggingface_hub for a repository.
            FileNotFoundError: If there is no such folder or repository, or a file is missing.
            ValueError: If the files do not hold a head of this class.
        """
        from ddcl_lightning.heads import saving

        return saving.load(
            cls,
            name_or_folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a readout head",
    ) -> str:
        """Upload the head to the Hugging Face hub, into a repository that is created where needed.

        Args:
            repo_id: ``"user/name"``.
            private: Whether a new repository is private; by default the account's choice.
            token: Access token; by default the one that ``hf auth login`` stored.
            commit_message: Message of the commit.

        Returns:
            Address of the commit.

        Raises:
            ImportError: Without huggingface_hub and safetensors.
        """
        from ddcl_lightning.heads import saving

        return saving.push(self, repo_id, private=private, token=token, commit_message=commit_message)


def check_rebuild(head: Head, embed_dim: int) -> bool:
    """True if a head is built already; raises if that was for another ``embed_dim``, or ``embed_dim`` is none."""
    require_at_least(1, embed_dim=embed_dim)
    if head.input_dim is not None and head.input_dim != embed_dim:
        raise ValueError(
            f"embed_dim of the head is {head.input_dim} but the backbone gives {embed_dim}. "
            "Leave the head's embed_dim out."
        )
    return head.input_dim is not None


def check_classifier(head: Head, classifier: nn.Linear) -> None:
    """Raise a ValueError unless a classifier is linear and reads what the head has pooled."""
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"classifier must be an nn.Linear, or its logits are no sum; got {type(classifier).__name__}. Replace it "
            "by one."
        )
    if head.input_dim is not None and classifier.in_features != head.pooled_dim:
        raise ValueError(
            f"classifier must read pooled_dim = {head.pooled_dim} numbers; got in_features = {classifier.in_features}. "
            "Pass the one that was trained with this head (Classification.classifier)."
        )


def check_tokens(head: Head, tokens: Tensor, mask: Tensor | None) -> None:
    """Raise unless the head is built for these tokens, and (on a CPU, where looking is free) none is left without any.

    Raises:
        RuntimeError: If the head is not built.
        TypeError: If the tokens are no floating-point tensor.
        ValueError: If a shape does not fit or a sample has no valid token.
    """
    name = type(head).__name__
    if head.input_dim is None:
        raise RuntimeError(f"{name} does not know its input dimension. Pass embed_dim or call build(embed_dim).")
    require_floating(tokens)
    if tokens.dim() != 3 or tokens.shape[-1] != head.input_dim or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens must have shape (B, T, embed_dim = {head.input_dim}) with T >= 1; got {tuple(tokens.shape)}. "
            f"Give {name} tokens of the dimension that it was built for, a single vector as (B, 1, embed_dim)."
        )
    require_tokens(tokens)
    check_mask(tokens, mask)
    if mask is None or torch.compiler.is_compiling() or mask.device.type != "cpu":
        return
    empty = torch.nonzero(~mask.any(-1)).flatten().tolist()
    if empty:
        raise ValueError(
            f"mask must leave at least one valid token in every sample; got none in {len(empty)} of {len(mask)} (the "
            f"first is number {empty[0]} of the batch). Drop empty samples from the data."
        )


def fill_padding(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens with padding set to zero, whatever it held; a sample without a valid token becomes NaN, not a guess."""
    if mask is None:
        return tokens, None
    empty = ~mask.any(-1, keepdim=True)
    filled = tokens.masked_fill(~mask.unsqueeze(-1), 0.0).masked_fill(empty.unsqueeze(-1), torch.nan)
    return filled, mask | empty
