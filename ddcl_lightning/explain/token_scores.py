"""Scores of tokens: how much each is said to speak for a class, by several definitions that can be compared."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ddcl_lightning.heads.base import Head
from ddcl_lightning.heads.hierarchical import HierarchicalReadout
from ddcl_lightning.heads.pooling import PoolingHead

Logits = Callable[[Tensor, Tensor | None], Tensor]  # of tokens (B, T, D) and their mask (B, T), (B, C)
MAX_ELEMENTS = 1 << 24  # numbers of one intermediate tensor


def readout_logits(head: Head, classifier: nn.Linear) -> Logits:
    """Function from tokens ``(B, T, D)`` and their mask ``(B, T)`` to logits ``(B, C)`` of a classifier of a head."""

    def logits(tokens: Tensor, mask: Tensor | None) -> Tensor:
        scores: Tensor = classifier(head(tokens, mask).pooled.to(classifier.weight.dtype))
        return scores

    return logits


def margins(logits: Tensor, classes: Tensor, others: Tensor | None = None) -> Tensor:
    """Logit of a class less that of another one.

    Args:
        logits: ``(B, *, C)``.
        classes: One per sample, ``(B,)`` int64.
        others: The classes to compare with, ``(B,)``; None for the logit alone.

    Returns:
        ``(B, *)``.
    """
    shape = (-1, *(1,) * (logits.dim() - 1))

    def of(numbers: Tensor) -> Tensor:
        index = numbers.to(logits.device).reshape(shape).expand(*logits.shape[:-1], 1)
        return logits.gather(-1, index).squeeze(-1)

    return of(classes) if others is None else of(classes) - of(others)


def class_terms(head: Head, tokens: Tensor, mask: Tensor | None, classifier: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Exact terms of the logits ``(B, T, H, K, C)``, and what lower levels of a hierarchy add to them, ``(B, C)``.

    Raises:
        ValueError: If the head has no exact contributions.
    """
    if isinstance(head, HierarchicalReadout) and head.pooling == "all" and head.num_levels > 1:
        *lower, last = head.level_contributions(tokens, mask, classifier)
        return last, torch.stack([terms.sum((1, 2, 3)) for terms in lower]).sum(0)
    return head.contributions(tokens, mask, classifier), None


def contribution_chunks(
    head: Head, classifier: nn.Linear, tokens: Tensor, mask: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a batch, and their exact terms ``(B', T, H, K, C)``, few enough at a time to fit into memory.

    Raises:
        ValueError: If the head has no exact contributions.
    """
    rows = 1
    start = 0
    while start < len(tokens):
        chunk = slice(start, start + rows)
        terms, _ = class_terms(head, tokens[chunk], None if mask is None else mask[chunk], classifier)
        yield chunk, terms
        start += rows
        rows = max(1, MAX_ELEMENTS // max(terms[0].numel(), 1))


@torch.no_grad()
def contribution_scores(
    head: Head,
    classifier: nn.Linear,
    tokens: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    others: Tensor | None = None,
) -> Tensor:
    """Sum over prototypes of the terms that each token adds to the margin of a class.

    Args:
        head: With exact contributions.
        classifier: Reads ``pooled``.
        tokens: At the head's input, ``(B, T, D)``.
        mask: ``(B, T)`` boolean, True for valid tokens, or None.
        classes: ``(B,)``.
        others: Classes to compare with, ``(B,)``; None for the class's logit alone.

    Returns:
        ``(B, T)``, zero at padding.

    Raises:
        ValueError: If the head has no exact contributions, or reads something else than these tokens.
    """
    rows = []
    for chunk, terms in contribution_chunks(head, classifier, tokens, mask):
        if terms.shape[1] != tokens.shape[1]:
            raise ValueError(
                f"tokens must be those that {type(head).__name__} sums over; it has terms of {terms.shape[1]} for "
                f"{tokens.shape[1]} tokens. Use a head that reads all tokens (tokens='all')."
            )
        rows.append(margins(terms.sum((2, 3)), classes[chunk], None if others is None else others[chunk]))
    return torch.cat(rows)


@torch.no_grad()
def prototype_scores(
    head: Head,
    classifier: nn.Linear,
    tokens: Tensor,
    mask: Tensor | None,
    classes: Tensor,
    others: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of the terms that each prototype adds to the margin of a class, ``(B, H, K)``.

    Arguments are those of :func:`contribution_scores`.

    Raises:
        ValueError: If the head has no exact contributions.
    """
    chunks = contribution_chunks(head, classifier, tokens, mask)
    return torch.cat(
        [margins(terms.sum(1), classes[chunk], None if others is None else others[chunk]) for chunk, terms in chunks]
    )


def gradient_times_input(
    logits: Logits, tokens: Tensor, mask: Tensor | None, classes: Tensor, others: Tensor | None = None
) -> Tensor:
    """Inner product of each token with the gradient of the margin with respect to it, ``(B, T)``."""
    with torch.enable_grad():
        inputs = tokens.detach().clone().requires_grad_()
        total = margins(logits(inputs, mask), classes, others).sum()
        (gradient,) = torch.autograd.grad(total, inputs)
    scores = (gradient * inputs).sum(-1).detach()
    return scores if mask is None else scores.masked_fill(~mask, 0.0)


@torch.no_grad()
def leave_one_out(
    logits: Logits, tokens: Tensor, mask: Tensor | None, classes: Tensor, others: Tensor | None = None
) -> Tensor:
    """Fall of the margin when a token is masked out, ``(B, T)``; zero at padding and for the only token of a sample."""
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
    whole = margins(logits(tokens, mask), classes, others)
    scores = torch.zeros(tokens.shape[:2], dtype=whole.dtype, device=tokens.device)
    for place in range(tokens.shape[1]):
        left = valid.clone()
        left[:, place] = False
        rows = torch.nonzero(valid[:, place] & left.any(1)).flatten()
        if len(rows):
            rest = margins(logits(tokens[rows], left[rows]), classes[rows], None if others is None else others[rows])
            scores[rows, place] = whole[rows] - rest
    return scores


@torch.no_grad()
def weight_scores(head: Head, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of the tokens in the summary of a head, ``(B, T)``; the mean over queries where it has several.

    Raises:
        ValueError: If the head has none.
    """
    if isinstance(head, PoolingHead):
        by_query = head.weights(tokens, mask)
        weights = None if by_query is None else by_query.mean(1)
    else:
        weights = head(tokens, mask).token_weights
    if weights is None or weights.shape != tokens.shape[:2]:
        raise ValueError(
            f"head must return one weight per token; {type(head).__name__} does not. Use a DDCLReadout that reads all "
            "tokens (tokens='all'), in evaluation mode, or attention pooling."
        )
    return weights


def random_scores(tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scores ``(B, T)`` of a random order of the tokens ``(B, T, D)``."""
    return torch.rand(tokens.shape[:2], generator=generator).to(tokens.device)
