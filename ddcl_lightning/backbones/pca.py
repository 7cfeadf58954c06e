"""Principal components as a linear encoder."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn.functional import linear

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning._utils.batch import Batch, inputs, refuse_mask
from ddcl_lightning.backbones.base import Backbone, Tokens, input_sample
from ddcl_lightning.backbones.identity import as_tokens, masked_tokens
from ddcl_lightning.nn.guarded_state import FINITE, FLAG, SHARE, GuardedState, Rules, running_dtype

WIDE = 512  # features beyond which the covariance is decomposed and not the sample, which would take minutes


class PCABackbone(GuardedState, Backbone):
    """A linear map fitted by principal component analysis of the training data, frozen unless told otherwise.

    A trainable one is a linear encoder *initialized* by PCA: after the first step it is no longer a PCA, and its
    representation says so.

    An image ``(C, H, W)`` is one vector of its pixels.

    Args:
        in_features: F, dimension of the data; None takes that of the data that it is fitted to, where components beyond
            those that the data have come out as zero. A trainable encoder needs the number.
        num_components: D, components to keep, at most F; also ``embed_dim``.
        whiten: Give every component unit variance; one without variance comes out as zero.
        trainable: Let the encoder's optimizer move the map after the fit.

    Attributes:
        fitted: Buffer, 1 after the fit and 0 before, saved with the state: a resumed run is not fitted again.
        explained_variance_ratio: Buffer, share of the variance that the kept components hold; 0 before the fit.

    Raises:
        ValueError: If the sizes do not fit each other.
        RuntimeError: If run before the fit.
    """

    fitted: Tensor
    explained_variance_ratio: Tensor
    state_rules: ClassVar[Rules] = {"weight": FINITE, "bias": FINITE, "fitted": FLAG, "explained_variance_ratio": SHARE}

    @typed
    def __init__(
        self, in_features: int | None, num_components: int, whiten: bool = False, trainable: bool = False
    ) -> None:
        super().__init__()
        if not 1 <= num_components <= (num_components if in_features is None else in_features):
            raise ValueError(
                f"num_components must be in [1, in_features = {in_features}]; got {num_components}. Keep fewer."
            )
        if in_features is None and trainable:
            raise ValueError(
                "in_features must be a number with trainable=True, for the optimizer comes before the data; got None. "
                "Pass the dimension of the data."
            )
        self._takes_any = in_features is None
        self.in_features, self.num_components, self.embed_dim = in_features, num_components, num_components
        self.whiten, self.trainable = whiten, trainable
        self.weight = nn.Parameter(torch.zeros(num_components, in_features or 0), requires_grad=trainable)
        self.bias = nn.Parameter(torch.zeros(num_components), requires_grad=trainable)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.float32))
        self.register_buffer("explained_variance_ratio", torch.zeros((), dtype=running_dtype()))

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Fit to a sample of the training inputs, once and for all."""
        if not bool(self.fitted):
            self.fit(input_sample(batches))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the components from a sample of inputs.

        Args:
            x: ``(N, F)``, ``(N, T, F)`` or images ``(N, C, H, W)``, all of it valid.

        Raises:
            ValueError: If there are fewer rows than components, a value is not finite or all rows are equal.
        """
        x = _flat_images(x)
        if self._takes_any:
            self._set_in_features(x.shape[-1])
        rows = as_tokens(x, self._width).reshape(-1, self._width).to("cpu", torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("x must be finite to fit a PCA; got NaN or infinity. Clean the data.")
        components = min(self.num_components, *rows.shape) if self._takes_any else self.num_components
        if len(rows) < components:
            raise ValueError(
                f"x must hold at least num_components = {self.num_components} rows to fit a PCA; got {len(rows)}. "
                "Lower num_components, or raise the batch size."
            )
        if bool((rows == rows[0]).all()):
            raise ValueError(f"x must vary to fit a PCA; got {len(rows)} equal rows. Check the data.")
        # Both solvers are deterministic, so every process and every run gets the same signs.
        solver: Literal["full", "covariance_eigh"] = "full" if self._width <= WIDE else "covariance_eigh"
        pca = PCA(components, whiten=self.whiten, svd_solver=solver).fit(rows.numpy())
        weight = torch.from_numpy(pca.components_)
        if self.whiten:
            deviation = torch.from_numpy(pca.explained_variance_).sqrt().unsqueeze(1)
            # A component without variance (a constant pixel) holds rounding noise: scaled up it would drown the rest.
            weight = torch.where(deviation > 1e-6 * deviation.max(), weight / deviation, 0.0)
        weight = torch.cat([weight, weight.new_zeros(self.num_components - components, self._width)])
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ torch.from_numpy(pca.mean_))
        self.explained_variance_ratio.fill_(float(pca.explained_variance_ratio_.sum()))
        self.fitted.fill_(1.0)

    def forward(self, batch: Batch) -> Tokens:
        """Components ``(B, T, num_components)`` of the batch's ``x``, with its ``mask``."""
        if not torch.compiler.is_compiling() and not bool(self.fitted):
            raise RuntimeError(
                "PCABackbone is not fitted. Trainer.fit does it on the training data; outside of it call "
                "backbone.fit(x) with a sample of inputs, or load a checkpoint."
            )
        x = inputs(batch)
        if x.dim() == 4:
            refuse_mask(batch, type(self).__name__)
            batch = _flat_images(x)
        x, valid = masked_tokens(batch, self._width)
        return Tokens(linear(x.to(self.weight.dtype), self.weight, self.bias), valid)

    @property
    def _width(self) -> int:
        return self.weight.shape[1]

    def _set_in_features(self, width: int) -> None:
        """Make room for the map of data of another dimension; the parameter stays the object that it is."""
        self.in_features = width
        self.weight.data = self.weight.data.new_zeros(self.num_components, width)

    def fit_to_state(self, prefix: str, state_dict: dict[str, Any]) -> None:
        """Take the dimension of the data from the state, where it was not given."""
        weight = state_dict.get(f"{prefix}weight")
        if self._takes_any and isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1]:
            self._set_in_features(weight.shape[1])

    def extra_repr(self) -> str:
        """Sizes and what the map is by now, for ``print``."""
        if not bool(self.fitted):
            state = "not fitted yet"
        elif self.weight.requires_grad:
            state = "linear encoder initialized by PCA, trainable: no longer a PCA once trained"
        else:
            state = f"frozen PCA, {float(self.explained_variance_ratio):.1%} of the variance kept"
        return f"in_features={self.in_features}, num_components={self.num_components}, whiten={self.whiten}; {state}"


def _flat_images(x: Tensor) -> Tensor:
    """Images ``(B, C, H, W)`` as vectors ``(B, C * H * W)``, bytes scaled to [0, 1]; anything else as it is."""
    if x.dim() != 4:
        return x
    return (x / 255 if x.dtype == torch.uint8 else x).flatten(1)
