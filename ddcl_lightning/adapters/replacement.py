"""Prototypes in the place of the MLPs of a network that exists: swapped in, started, distilled, and taken out again."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from torch import nn
from torch.utils.hooks import RemovableHandle

from ddcl_lightning.adapters.feedforward import DDCLFeedForward
from ddcl_lightning.adapters.mask import MaskReader
from ddcl_lightning.adapters.mlp_blocks import Blocks, MLPSite, choose_mlps


class FeedForwardReplacement:
    """Layers in the place of MLPs; as a context manager it restores the MLPs at the end of the block.

    Attributes:
        model: The model.
        parts: The new layers by the name of what they stand for, in the order of the blocks.
    """

    def __init__(self, model: nn.Module, sites: list[MLPSite], layers: list[nn.Module], mask: str | None) -> None:
        self.model, self.mask = model, mask
        self.layers = {site.places[0]: layer for site, layer in zip(sites, layers, strict=True)}
        self._sites = {site.places[0]: site for site in sites}
        self._handle: RemovableHandle | None = None
        self._put(self.layers)
        if mask is not None:
            self._handle = model.register_forward_pre_hook(MaskReader(mask), with_kwargs=True)

    def originals(self) -> dict[str, list[nn.Module]]:
        """The modules of the replaced MLPs, by the same names."""
        return {name: list(site.modules) for name, site in self._sites.items()}

    def restore(self) -> None:
        """Put the MLPs back, on the device, in the dtype and mode of what stood for them; a second call does nothing.

        Raises:
            RuntimeError: If a later replacement of the same MLPs has not been restored.
        """
        if not self.layers:
            return
        for name, layer in self.layers.items():
            if self.model.get_submodule(name) is not layer:
                raise RuntimeError(
                    f"{name!r} is no longer what this replacement put there, but a "
                    f"{type(self.model.get_submodule(name)).__name__}. Restore later replacements first."
                )
        for name, layer in self.layers.items():
            like = next(layer.parameters(), next(self._sites[name].modules[0].parameters()))
            for module in self._sites[name].modules:
                module.to(like.device, like.dtype).train(layer.training)
        self._take_out()
        if self._handle is not None:
            self._handle.remove()
        self.layers = {}

    def __enter__(self) -> "FeedForwardReplacement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            first, *rest = self._sites[name].places
            self.model.set_submodule(first, layer)
            for place in rest:
                self.model.set_submodule(place, nn.Identity())

    def _take_out(self) -> None:
        for site in self._sites.values():
            for place, module in zip(site.places, site.modules, strict=True):
                self.model.set_submodule(place, module)

    @contextmanager
    def _original_model(self) -> Iterator[None]:
        self._take_out()
        try:
            yield
        finally:
            self._put(self.layers)


def replace_feedforward(
    model: nn.Module,
    create: Callable[[int], nn.Module] = DDCLFeedForward,
    blocks: Blocks = "all",
    *,
    mask: str | None = None,
) -> FeedForwardReplacement:
    """Put new layers in the place of the MLPs of a Hugging Face or timm model, until they are restored.

    Found are blocks that hold an MLP as one module (``mlp``, ``ffn``, ``feed_forward``: timm's ViT, DistilBERT, GPT-2
    and most others), and those of BERT's kind, whose ``intermediate`` and ``output.dense`` are its two halves: there
    the layer takes the place of the first and ``nn.Identity`` that of the second, and dropout, residual and LayerNorm
    stay. The new layers are parts of the model like any other: trained, saved and found by callbacks with it. They have
    the device, dtype and mode of what they replace, and start at random: see :func:`distill_feedforward`.

    Args:
        model: Changed in place.
        create: Called with D for each block; returns a module ``(*, D) -> (*, D)``, by default
            :class:`DDCLFeedForward` with its defaults.
        blocks: Numbers of blocks in the order of the model (negative ones from the end), qualified names of modules
            ``(*, D) -> (*, D)`` of your own choice, or ``"all"`` that are found.
        mask: Name of the argument of ``model.forward`` that is a ``(B, T)`` mask, not zero for valid tokens; by default
            ``"attention_mask"`` where there is one.

    Raises:
        ValueError: If no MLP is found, a block or ``mask`` is unknown or named twice, a module does not map D to D, or
            is used under several names; nothing is replaced then.
    """
    sites = choose_mlps(model, blocks)
    arguments = inspect.signature(model.forward).parameters
    if mask is None:
        mask = "attention_mask" if "attention_mask" in arguments else None
    elif mask not in arguments:
        raise ValueError(
            f"mask must name an argument of {type(model).__name__}.forward; got {mask!r}. Name one that holds the "
            "mask, or leave mask out."
        )
    layers = []
    for site in sites:
        like = next(site.modules[0].parameters())
        layers.append(create(site.dim).to(like.device, like.dtype).train(site.modules[0].training))
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(
            "create must return a new module at each call; got one twice. Build the module inside of create."
        )
    return FeedForwardReplacement(model, sites, layers, mask)
