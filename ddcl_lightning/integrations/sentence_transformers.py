"""A readout head as the pooling of a SentenceTransformer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.heads import Head, saving
from ddcl_lightning.module import DDCLReadoutModule

try:
    from sentence_transformers.base.modules import Module
except ImportError as error:
    raise ImportError(
        "PrototypePooling needs sentence-transformers 6 or newer: pip install 'ddcl-lightning[sentence-transformers]'."
    ) from error


class PrototypePooling(Module):
    """Pooling of a SentenceTransformer's tokens by any head of this package.

    Put it after the encoder: ``SentenceTransformer(modules=[Transformer(folder), PrototypePooling(head)])``. A saved
    model loads with ``trust_remote_code=True``, which sentence-transformers asks for every module that is not its own.

    Args:
        head: Built for the encoder's dimension (``embed_dim=`` or ``build``).

    Raises:
        ValueError: If the head is not built.
    """

    config_keys = ["head_config"]  # noqa: RUF012 - as the base class declares it

    @typed
    def __init__(self, head: Head) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if head.input_dim is None:
            raise ValueError(
                f"{type(head).__name__} must be built for the encoder: pass embed_dim, or call build(embed_dim)."
            )
        self.head = head

    @classmethod
    def from_module(cls, module: DDCLReadoutModule) -> "PrototypePooling":
        """The head of a trained module (``DDCLReadoutModule.load_from_checkpoint``, say); it is shared, not copied."""
        return cls(module.head)

    @property
    def head_config(self) -> dict[str, Any]:
        """Class, dimension and arguments of the head, as plain data."""
        return saving.describe(self.head)

    def forward(self, features: dict[str, Tensor | Any], **kwargs: Any) -> dict[str, Tensor | Any]:
        """Add what the head reads out of the encoder's tokens to the features.

        Args:
            features: With ``token_embeddings`` ``(B, T, D)`` and ``attention_mask`` ``(B, T)``, 0 for padding (or the
                flat form ``(1, N, D)`` with ``cu_seq_lens_q`` that the library uses to skip padding).
            kwargs: Ignored.

        Returns:
            The features with ``sentence_embedding`` ``(B, pooled_dim)``. For heads with prototypes also, in evaluation
            mode, ``prototype_assignments`` ``(B, H, K)`` and, where the head has them, ``token_weights`` ``(B, T)``;
            while training, the scalars ``quantization_loss`` and ``regularization``, which a loss may add to its own.

        Raises:
            ValueError: If the mask does not fit the tokens.
        """
        tokens, mask = _tokens(features)
        readout = self.head(tokens, mask)
        features["sentence_embedding"] = readout.pooled
        if readout.assignments is not None and not self.training:
            features["prototype_assignments"] = readout.assignments
        if readout.token_weights is not None and not self.training:
            features["token_weights"] = readout.token_weights
        if self.training and readout.loss_terms:
            features["quantization_loss"] = readout.quantization_loss()
        if self.training and readout.regularization is not None:
            features["regularization"] = readout.regularization
        return features

    def get_embedding_dimension(self) -> int:
        """Dimension of the sentence embedding."""
        return self.head.pooled_dim

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config and weights into ``output_path``."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "PrototypePooling":
        """Load a saved module from a folder or the hub; the class of its head must have been imported.

        Raises:
            ValueError: If the files do not describe a head.
        """
        place: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = cls.load_config(model_name_or_path, **place)
        module = cls(saving.create(config.get("head_config", {})))
        cls.load_torch_weights(model_name_or_path, model=module, **place)
        return module

    def extra_repr(self) -> str:
        """The head, for ``print``."""
        return repr(self.head)


def _tokens(features: dict[str, Tensor | Any]) -> tuple[Tensor, Tensor | None]:
    """Tokens ``(B, T, D)`` and their mask ``(B, T)``."""
    tokens: Tensor = features["token_embeddings"]
    if "cu_seq_lens_q" in features:
        lengths = features["cu_seq_lens_q"].diff()
        tokens = pad_sequence(list(torch.split(tokens.squeeze(0), lengths.tolist())), batch_first=True)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    mask = features.get("attention_mask")
    if mask is None:
        return tokens, None
    # An additive mask (0 and minus infinity) would be read the wrong way round; looking waits for an accelerator.
    if mask.device.type == "cpu" and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"attention_mask must be 1 for tokens and 0 for padding; got values from {float(mask.min())} to "
            f"{float(mask.max())}. Pass what the tokenizer gives."
        )
    return tokens, mask.bool()
