"""Finding the MLPs of a Hugging Face or timm model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.modes import evaluating

Blocks = Literal["all"] | Iterable[int | str]
CHILDREN = ("mlp", "ffn", "feed_forward")  # what blocks call an MLP that is one module
CHUNK = 4096  # tokens that go through an MLP at a time


@dataclass(frozen=True)
class MLPSite:
    """An MLP: its modules by name, in the order in which tokens pass them, and D."""

    places: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    dim: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Outputs of the MLP for tokens ``(N, D)``, in evaluation mode and its own dtype, as float32."""
        like = next(self.modules[0].parameters())
        outputs = []
        with evaluating(*self.modules):
            for chunk in torch.split(tokens, CHUNK):
                hidden = chunk.to(like).unsqueeze(0)  # Hugging Face chunks along a dimension of its own
                for module in self.modules:
                    hidden = module(hidden)
                outputs.append(hidden[0].float())
        return torch.cat(outputs)


def choose_mlps(model: nn.Module, blocks: Blocks) -> list[MLPSite]:
    """The MLPs of the chosen blocks."""
    if isinstance(blocks, str) and blocks != "all":
        raise ValueError(f"blocks must be 'all', or a list of numbers or names; got {blocks!r}. Put it in a list.")
    chosen: list[int | str] | None = None if isinstance(blocks, str) else list(blocks)
    mlps = [] if chosen and all(isinstance(block, str) for block in chosen) else _find(model)
    if chosen is None:
        chosen = list(range(len(mlps)))
    sites = []
    for block in chosen:
        if isinstance(block, str):
            sites.append(_named(model, block))
        elif -len(mlps) <= block < len(mlps):
            sites.append(mlps[block])
        else:
            raise ValueError(
                f"blocks must be in [{-len(mlps)}, {len(mlps) - 1}] for this model; got {block}. Count from 0."
            )
    places = [place for site in sites for place in site.places]
    if not sites or len(set(places)) < len(places):
        raise ValueError(
            f"blocks must name at least one block, and each once; got {chosen}. Give their numbers, or leave blocks "
            "out."
        )
    modules = {id(module) for site in sites for module in site.modules}
    names = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in modules]
    if len(names) > len(modules):
        raise ValueError(f"an MLP must have one name to be replaced; these share theirs: {', '.join(sorted(names))}.")
    return sites


def _find(model: nn.Module) -> list[MLPSite]:
    """All MLPs that have one of the known forms, in the order of the model."""
    sites: list[MLPSite] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        first, last = getattr(module, "intermediate", None), getattr(module, "output", None)
        up, down = getattr(first, "dense", None), getattr(last, "dense", None)
        if isinstance(first, nn.Module) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear):
            if up.in_features == down.out_features and up.out_features == down.in_features:
                places = (f"{prefix}intermediate", f"{prefix}output.dense")
                sites.append(MLPSite(places, (first, down), up.in_features))
            continue
        for child in CHILDREN:
            block = getattr(module, child, None)
            sizes = _sizes(block) if isinstance(block, nn.Module) else None
            if isinstance(block, nn.Module) and sizes is not None and sizes[0] == sizes[1]:
                sites.append(MLPSite((prefix + child,), (block,), sizes[0]))
    if not sites:
        raise ValueError(
            f"no MLP was found in {type(model).__name__}: looked for blocks with a child "
            f"{', '.join(map(repr, CHILDREN))} of linear layers from D to D, or with 'intermediate.dense' and "
            "'output.dense'. Pass the qualified names of the modules (*, D) -> (*, D) as blocks."
        )
    return sites


def _named(model: nn.Module, name: str) -> MLPSite:
    known = dict(model.named_modules())
    if name not in known or not name:
        raise ValueError(f"blocks must name modules of the model; got {name!r}. See model.named_modules().")
    sizes = _sizes(known[name])
    if sizes is None or sizes[0] != sizes[1]:
        raise ValueError(
            f"blocks must name modules (*, D) -> (*, D) made of linear layers; {name!r}, a "
            f"{type(known[name]).__name__}, {'has none' if sizes is None else f'maps {sizes[0]} to {sizes[1]}'}. "
            "Number the block instead where its MLP is split in two, as BERT's."
        )
    return MLPSite((name,), (known[name],), sizes[0])


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Dimension before the first and after the last linear layer."""
    layers: list[tuple[int, int]] = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layers.append((layer.in_features, layer.out_features))
        elif type(layer).__name__ == "Conv1D":  # GPT-2's linear layer, whose weight is (in, out)
            weight: Any = layer.weight
            layers.append((weight.shape[0], weight.shape[1]))
    return (layers[0][0], layers[-1][1]) if layers else None
