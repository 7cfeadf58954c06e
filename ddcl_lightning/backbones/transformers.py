"""Text encoders and decoders of the transformers library."""

import json
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs, texts, token_mask
from ddcl_lightning.backbones._model_files import first_line
from ddcl_lightning.backbones._transformers_loading import (
    load_encoder,
    load_tokenizer,
    longest_input,
    tokenizer_fingerprint,
)
from ddcl_lightning.backbones.base import Tokens
from ddcl_lightning.backbones.feature_cache import CacheDtype, content_key
from ddcl_lightning.backbones.pretrained import PretrainedBackbone, Samples, Unfreeze, gradient_reaches
from ddcl_lightning.functional import masked_mean

TextTokens = Literal["all", "cls", "last", "mean"]

# What a configuration says without deciding any token.
_NOT_CONTENT = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


class TransformersBackbone(PretrainedBackbone):
    """Hidden states of any text model that ``AutoModel`` loads; of an encoder-decoder model, those of its encoder.

    Reads batches with ``text``, which it tokenizes itself, or with token ids ``x`` ``(B, T)`` int64 and their ``mask``
    ``(B, T)``, padded at the end. A text without any token (GPT-2 and an empty string) becomes one
    end-of-text token.

    Args:
        model: Name on the Hugging Face hub, or a folder that ``save_pretrained`` wrote.
        tokens: ``"all"`` returns every token with a mask, special ones (``[CLS]``, ``[SEP]``) among them; ``"cls"``
            the class token, ``"last"`` the last token (for decoders) and ``"mean"`` the mean over valid tokens, T = 1.
        layer: Hidden state to return: 0 for the embeddings, 1 to depth or -1 to -depth for the output of a block. The
            last one includes the model's final normalization, if it has one. Blocks beyond are not computed.
        max_length: Longest text in tokens; longer ones are cut.
        unfreeze: 0 keeps the encoder frozen, n trains the last n blocks up to ``layer``, ``"all"`` everything.
        gradient_checkpointing: Compute activations twice to keep fewer of them; needs ``unfreeze``.
        cache_dir: Folder where tokens of a frozen encoder are kept, see :class:`PretrainedBackbone`.
        cache_dtype: Of the tokens there.
        revision: Branch, tag or commit of a model on the hub.
        cache_gb: Most that the cache may take on disk, in GiB; None allows half of what is free.

    Attributes:
        embed_dim: Dimension of the hidden states.
        tokenizer: The model's tokenizer, or None where it comes without one: then batches hold ids.

    Raises:
        ImportError: Without transformers (``pip install 'ddcl-lightning[text]'``).
        OSError: If the model is neither a folder nor on the hub.
        ValueError: If an argument is out of its range, or does not fit the model.
    """

    ragged: bool
    _pool_batches = 8

    @typed
    def __init__(
        self,
        model: str,
        tokens: TextTokens = "all",
        layer: int = -1,
        max_length: int = 128,
        unfreeze: Unfreeze = 0,
        gradient_checkpointing: bool = False,
        cache_dir: str | None = None,
        cache_dtype: CacheDtype = "float16",
        revision: str | None = None,
        cache_gb: float | None = None,
    ) -> None:
        super().__init__(unfreeze, gradient_checkpointing, cache_dir, cache_dtype, cache_gb)
        if tokens not in get_args(TextTokens):
            raise ValueError(f"tokens must be one of {get_args(TextTokens)}; got {tokens!r}. Choose one of them.")
        self.model, self.tokens, self.max_length, self.revision = model, tokens, max_length, revision
        self.ragged = tokens == "all"
        self.encoder = load_encoder(model, revision)
        self.tokenizer = load_tokenizer(model, revision)
        self._check_lengths()
        if tokens == "cls" and self.tokenizer is not None and self.tokenizer.cls_token is None:
            raise ValueError(f"tokens='cls' needs a model with a class token, which {model!r} has not; use 'mean'.")

        config: Any = self.encoder.config
        depth = int(config.num_hidden_layers)
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"layer must be in [-{depth + 1}, {depth}] for {model!r} of depth {depth}; got {layer}. Choose one of "
                "these layers."
            )
        self.layer = layer % (depth + 1)  # from the embeddings
        self._inner = self.layer < depth
        blocks = max(
            (layers for layers in self.encoder.modules() if isinstance(layers, nn.ModuleList)), key=len, default=None
        )
        if blocks is not None and len(blocks) != depth:  # blocks that share their weights
            blocks = None
        if blocks is not None:
            # The output of the last block goes through the final norm, so the one after the wanted stays.
            del blocks[self.layer + 1 :]
        try:
            with torch.no_grad():
                self.embed_dim = self._probe().shape[-1]
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"model {model!r} ({type(self.encoder).__name__}) does not turn token ids into hidden states "
                f"({first_line(error)}); use a text model."
            ) from None
        used = None if blocks is None else list(blocks)[: self.layer]
        groups = None if used is None else [list(block.parameters()) for block in used]
        if used and groups and not self._inner and unfreeze not in (0, "all"):
            groups[-1] += self._parameters_behind(used[-1])
        self._set_trainable(groups, self._probe)
        if gradient_checkpointing:
            self._checkpoint_gradients()
        self.train(self.training)

    # Tokens --------------------------------------------------------------------------------------

    def samples(self, batch: Batch) -> Samples:
        """The texts of a batch, or the ids of each sample without padding."""
        if isinstance(batch, dict) and "text" in batch:
            return texts(batch)
        ids = inputs(batch)
        if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"batch x must hold token ids (B, T) as integers; got {ids.dtype} of shape {tuple(ids.shape)}. Give "
                "the batch 'text' to have it tokenized."
            )
        if ids.shape[1] > self.limit:
            raise ValueError(
                f"batch x must have at most {self.limit} tokens, as {self.model!r}; got {ids.shape[1]}. Shorten the "
                "texts."
            )
        valid = token_mask(batch, ids)
        if valid is None:
            return list(ids)
        lengths = valid.sum(1)
        if bool((valid != (torch.arange(ids.shape[1], device=valid.device) < lengths[:, None])).any()):
            raise ValueError("mask must be True for the tokens of a text and False after them: pad x at the end.")
        if bool((lengths == 0).any()):
            raise ValueError(f"mask leaves no token in {int((lengths == 0).sum())} samples; drop them, or keep one.")
        return [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]

    def keys(self, samples: Samples) -> list[bytes]:
        """Hashes of texts or of ids, which never meet."""
        return [
            content_key(b"text", sample.encode("utf-8", "surrogatepass"))
            if isinstance(sample, str)
            else content_key(b"ids", sample.to("cpu", torch.int64).contiguous().numpy().tobytes())
            for sample in samples
        ]

    def forward(self, batch: Batch) -> Tokens:
        """Tokens ``(B, T, embed_dim)`` of a batch; T is that of the ids, or of the longest text."""
        features = super().forward(batch)
        if not self.ragged or (isinstance(batch, dict) and "text" in batch):
            return features
        missing = inputs(batch).shape[1] - features.values.shape[1]  # columns of padding alone
        values = nn.functional.pad(features.values, (0, 0, 0, missing))
        return Tokens(values, None if features.mask is None else nn.functional.pad(features.mask, (0, missing)))

    def encode(self, samples: Samples) -> Tokens:
        """Hidden states of texts or ids."""
        if isinstance(samples[0], str):
            ids, valid = self._tokenize(list(samples))
        else:
            ids = pad_sequence(list(samples), batch_first=True).long()
            lengths = torch.tensor([len(sample) for sample in samples], device=ids.device)
            valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        device = self._like().device
        ids, valid = ids.to(device), valid.to(device)
        values = self._hidden_state(ids, valid)
        if self.tokens == "all":
            return Tokens(values, valid)
        if self.tokens == "cls":
            return Tokens(values[:, :1])
        if self.tokens == "last":
            rows = torch.arange(len(values), device=device)
            return Tokens(values[rows, valid.sum(1) - 1].unsqueeze(1))
        return Tokens(masked_mean(values, valid, dim=-2).unsqueeze(1))

    def spans(self, batch: Batch) -> list[list[tuple[int, int]]]:
        """Character spans of the tokens of each text, for ``tokens="all"``.

        Returns:
            For each text and each of its valid tokens ``(start, end)`` in characters; ``(0, 0)`` for special tokens.

        Raises:
            ValueError: If tokens are pooled, or the tokenizer does not tell.
        """
        if self.tokens != "all":
            raise ValueError(
                f"spans needs tokens='all', one token for each piece of text; got {self.tokens!r}. Set tokens='all'."
            )
        content = _encodable(texts(batch))
        if not self._require_tokenizer().is_fast:
            raise ValueError(f"spans needs a fast tokenizer; that of {self.model!r} does not tell where tokens stand.")
        encoding = self._require_tokenizer()(
            content, truncation=True, max_length=self.max_length, return_offsets_mapping=True
        )
        return [[(start, end) for start, end in text] or [(0, 0)] for text in encoding["offset_mapping"]]

    def token_names(self, batch: Batch) -> list[list[str]]:
        """Names of the valid tokens of each text as the tokenizer writes them, such as ``[CLS]``."""
        tokenizer = self._require_tokenizer()
        encoding = tokenizer(_encodable(texts(batch)), truncation=True, max_length=self.max_length)
        return [tokenizer.convert_ids_to_tokens(ids) for ids in encoding["input_ids"]]

    def recipe(self) -> dict[str, Any]:
        """Configuration, layer, kind of tokens and tokenizer."""
        settings: Any = self.encoder.config
        config = settings.to_dict()
        kept = {name: value for name, value in config.items() if name[0] != "_" and name not in _NOT_CONTENT}
        return {
            "config": json.loads(json.dumps(kept, default=str)),
            "layer": self.layer,
            "tokens": self.tokens,
            "max_length": self.max_length,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def extra_repr(self) -> str:
        """The arguments that decide the tokens."""
        return f"{self.model!r}, tokens={self.tokens!r}, layer={self.layer}, unfreeze={self.unfreeze!r}"

    # Inside --------------------------------------------------------------------------------------

    def _hidden_state(self, ids: Tensor, valid: Tensor) -> Tensor:
        output = self.encoder(input_ids=ids, attention_mask=valid.long(), output_hidden_states=self._inner)
        state: Tensor = output.hidden_states[self.layer] if self._inner else output.last_hidden_state
        return state

    def _probe(self) -> Tensor:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        return self._hidden_state(ids, torch.ones_like(ids, dtype=torch.bool))

    def _parameters_behind(self, block: nn.Module) -> list[nn.Parameter]:
        """Parameters between a block and the tokens (a final norm): those that a cut behind the block still reaches."""
        handle = block.register_forward_hook(lambda _module, _args, output: _detached(output))
        try:
            return gradient_reaches(self._probe, self.encoder)
        finally:
            handle.remove()

    def _checkpoint_gradients(self) -> None:
        # transformers 5 has renamed it, and warns about the old name.
        enable = getattr(self.encoder, "activation_checkpointing_enable", None)
        try:
            if enable is not None:
                enable({"use_reentrant": False})
            else:
                self.encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(
                f"gradient_checkpointing does not work with {self.model!r}: {first_line(error)}. Leave it out."
            ) from None

    def _check_lengths(self) -> None:
        self.limit = longest_input(self.encoder, self.tokenizer)
        shortest = 1 if self.tokenizer is None else 1 + self.tokenizer.num_special_tokens_to_add()
        if not shortest <= self.max_length <= self.limit:
            raise ValueError(
                f"max_length must be in [{shortest}, {self.limit}] tokens for {self.model!r}; got {self.max_length}. "
                "Choose one in this range."
            )

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"model {self.model!r} comes without a tokenizer that can be loaded, so it cannot read text; put the "
                "tokenizer's files beside config.json (tokenizer.save_pretrained(folder)), or give batches of token "
                "ids x with a mask."
            )
        return self.tokenizer

    def _tokenize(self, content: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``(B, T)`` of texts."""
        tokenizer = self._require_tokenizer()
        encoding = tokenizer(
            _encodable(content), padding=True, truncation=True, max_length=self.max_length, return_attention_mask=True
        )
        ids = torch.tensor(encoding["input_ids"], dtype=torch.int64).view(len(content), -1)
        valid = torch.tensor(encoding["attention_mask"], dtype=torch.bool).view(len(content), -1)
        if not valid.shape[1]:  # empty texts alone
            ids = torch.full((len(content), 1), tokenizer.pad_token_id)
            valid = torch.zeros(len(content), 1, dtype=torch.bool)
        empty = ~valid.any(1)
        ids[empty, 0] = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        valid[empty, 0] = True
        return ids, valid


def _encodable(content: list[str]) -> list[str]:
    """Texts with ``?`` for halves of surrogate pairs (an emoji that JSON has cut), which no tokenizer takes."""
    return [text.encode("utf-8", "replace").decode("utf-8") for text in content]


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(item) for item in output) if isinstance(output, tuple) else output
