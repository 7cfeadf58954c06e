"""Texts without some of their word pieces, read by the encoder anew.

Masking tokens at a head's input leaves in the others what the encoder has mixed into them. With
:func:`reencoded_logits` curves and scores of word pieces (:mod:`~ddcl_lightning.explain.faithfulness`,
:func:`~ddcl_lightning.explain.token_scores.leave_one_out`) are those of the text as it would have been written.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ddcl_lightning.backbones.base import Tokens
from ddcl_lightning.backbones.transformers import TransformersBackbone
from ddcl_lightning.explain.token_scores import Logits, readout_logits
from ddcl_lightning.heads.base import Head


def word_pieces(backbone: TransformersBackbone, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Word pieces of texts, as the backbone cuts them.

    Args:
        backbone: With a tokenizer.
        texts: B of them.

    Returns:
        ``(B, T, 2)`` int64, the id of every token and 1 for special ones such as ``[CLS]``, zero at padding; and
        ``(B, T)`` boolean, True for word pieces, False for special tokens and padding.

    Raises:
        ValueError: If the backbone has no tokenizer, or a text has no word piece.
    """
    if backbone.tokenizer is None:
        raise ValueError(
            f"backbone must have a tokenizer to read texts; that of {backbone.model!r} could not be loaded."
        )
    encoding = backbone.tokenizer(
        list(texts), truncation=True, max_length=backbone.max_length, return_special_tokens_mask=True
    )
    rows = [
        torch.tensor([ids, special], dtype=torch.int64).T
        for ids, special in zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
    ]
    empty = [at for at, row in enumerate(rows) if not len(row) or bool(row[:, 1].all())]
    if empty:
        raise ValueError(f"texts must have at least one word piece each; number {empty[0]} has none. Leave it out.")
    pieces = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([row[:, 1] == 0 for row in rows], batch_first=True)
    return pieces, mask


def reencoded_logits(encode: Callable[[list[Tensor]], Tokens], head: Head, classifier: nn.Linear) -> Logits:
    """Function from word pieces and the mask of those that are kept to the logits of the text that they make.

    The others are cut out, not replaced; special tokens always stay.

    Args:
        encode: From the ids of every text, ``(T_i,)`` each, to its tokens: ``TransformersBackbone.encode``.
        head: In evaluation mode.
        classifier: Reads ``pooled``.

    Returns:
        Takes ``(B, T, 2)`` and ``(B, T)`` of :func:`word_pieces`; returns ``(B, C)``. Use it where a function of
        tokens and mask is asked for, with the word pieces in the place of the tokens.
    """
    logits = readout_logits(head, classifier)

    @torch.no_grad()
    def reencoded(pieces: Tensor, mask: Tensor | None) -> Tensor:
        special = pieces[..., 1] == 1
        kept = torch.ones_like(special) if mask is None else mask | special
        ids = [row[keep] for row, keep in zip(pieces[..., 0], kept, strict=True)]
        return logits(*encode(ids))

    return reencoded
