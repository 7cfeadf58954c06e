"""Use of the codes of one or several codebooks, counted by hard codes, over a whole data set.

Nothing here has a threshold: a code is used if at least one token has it.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.functional import code_counts, effective_number
from ddcl_lightning.functional._common import require_floating, require_integers
from ddcl_lightning.metrics.clustering_metrics import perplexity, usage


def codebook_counts(codes: Tensor, num_codes: int) -> Tensor:
    """Tokens on each code of every codebook.

    Args:
        codes: ``(..., H)`` integers in [0, K), one column per codebook; -1 for padding, which is left out.
        num_codes: K.

    Returns:
        Counts, ``(H, K)`` int64, on the device of ``codes``.

    Raises:
        TypeError: If the codes are not a tensor of integers.
        ValueError: On a CPU, where looking is free, if a code is out of range.
    """
    require_integers("codes", codes)
    rows = codes.reshape(-1, codes.shape[-1]).T.long()
    if rows.device.type == "cpu" and rows.numel():
        low, high = (int(value) for value in rows.aminmax())
        if low < -1 or high >= num_codes:
            raise ValueError(
                f"codes must be in [0, num_codes = {num_codes}), or -1 for padding; got values from {low} to {high}. "
                "Set num_codes of the head to the size of its codebook."
            )
    return code_counts(rows, num_codes)


def soft_perplexity(mass: Tensor) -> Tensor:
    """Exponential of the entropy (in nats) of the mean soft assignment: how many prototypes share it, in effect.

    It does not tell a crisp codebook in even use from one whose every token is shared evenly by all; the perplexity of
    the hard codes does.

    Args:
        mass: Soft assignment, mean or sum over tokens, ``(K,)``, at least one entry > 0.

    Returns:
        Scalar in [1, K].
    """
    return effective_number(mass)


class CodebookMetrics(Metric):
    """Use of codebooks, from counts of hard codes and, where there are some, sums of soft assignments.

    Args:
        num_codes: K, codes per codebook, at least 1.
        num_codebooks: H, at least 1.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Attributes:
        counts: Tokens on each code, ``(H, K)`` int64.
        mass: Sum over samples of their mean soft assignment, ``(H, K)`` float32; zero without any.

    Raises:
        ValueError: If a size is below 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    mass: Tensor

    @typed
    def __init__(self, num_codes: int, num_codebooks: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_codes", num_codes), ("num_codebooks", num_codebooks)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Pass 1 or more.")
        self.num_codes, self.num_codebooks = num_codes, num_codebooks
        counts = torch.zeros(num_codebooks, num_codes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("mass", counts.float(), dist_reduce_fx="sum")

    def update(self, codes: Tensor, assignments: Tensor | None = None) -> None:
        """Add the codes of a batch.

        Args:
            codes: ``(..., H)`` integers in [0, K), -1 for padding; of one codebook any shape, as a quantizer returns
                them.
            assignments: Mean soft assignment of each sample, ``(B, H, K)``, or None.

        Raises:
            TypeError: If the codes are not a tensor of integers, or the assignments no tensor of floats.
            ValueError: If a shape does not fit or, on a CPU, a code is out of range.
        """
        require_integers("codes", codes)
        if assignments is not None:
            require_floating(assignments, "assignments")
        if self.num_codebooks == 1:
            codes = codes.reshape(-1, 1)
        if codes.shape[-1:] != (self.num_codebooks,):
            raise ValueError(
                f"codes must have shape (..., num_codebooks = {self.num_codebooks}); got {tuple(codes.shape)}. Set "
                "num_codebooks of the head to the number of its codebooks."
            )
        if assignments is not None and assignments.shape[1:] != self.mass.shape:
            raise ValueError(
                f"assignments must have shape (B, {self.num_codebooks}, {self.num_codes}), one share per code of each "
                f"codebook; got {tuple(assignments.shape)}. Leave them out where they are of something else."
            )
        self.counts += codebook_counts(codes, self.num_codes)
        if assignments is not None:
            self.mass += assignments.float().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Metrics of all tokens since the last reset, over all processes.

        Returns:
            Scalars ``usage`` (share of the codes that at least one token has, in (0, 1]), ``perplexity`` (in
            [1, K]) and ``soft_perplexity`` (NaN without assignments), means over the codebooks; and, where there
            are several, those of each, ``codebook0_usage`` and so on.

        Raises:
            RuntimeError: If no token was seen.
        """
        if not self.counts.any():
            raise RuntimeError(
                "CodebookMetrics must see at least one token before compute(); got none since the last reset. Call "
                "update(codes) first."
            )
        books = [self._of_codebook(counts, mass) for counts, mass in zip(self.counts, self.mass, strict=True)]
        values = {name: torch.stack([book[name] for book in books]).mean() for name in books[0]}
        if len(books) > 1:
            values |= {f"codebook{i}_{name}": value for i, book in enumerate(books) for name, value in book.items()}
        return values

    @staticmethod
    def _of_codebook(counts: Tensor, mass: Tensor) -> dict[str, Tensor]:
        soft = soft_perplexity(mass)  # 0 / 0 is NaN, which is what no assignment means
        return {"usage": usage(counts), "perplexity": perplexity(counts), "soft_perplexity": soft}
