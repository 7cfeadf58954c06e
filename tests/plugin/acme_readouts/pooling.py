"""A head without prototypes, of a width that may follow from ``max_parameters``."""

from torch import Tensor, nn

from ddcl_lightning import PoolingHead, typed


class NormPooling(PoolingHead):
    """The length of the mean token in each of several learned subspaces."""

    @typed
    def __init__(self, dim: int | None = None, max_parameters: int | None = None) -> None:
        super().__init__()
        self.dim, self.max_parameters = dim, max_parameters

    def create(self, embed_dim: int, width: int | None) -> int:
        width = width or embed_dim
        self.linear = nn.Linear(embed_dim, 2 * width)
        return width

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        valid = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        mean = (tokens * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True)
        return self.linear(mean).unflatten(-1, (-1, 2)).square().sum(-1)
