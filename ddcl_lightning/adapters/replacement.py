"""Prototypes in the place of the MLPs of a network that exists: swapped in, started, distilled, and taken out again."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from ddcl_lightning.adapters.feedforward import DDCLFeedForward
from ddcl_lightning._utils.modes import evaluating
from ddcl_lightning.adapters.insertion import PlacedPrototypes, _MaskReader
from ddcl_lightning.optim.two_timescale import lr_factor
from ddcl_lightning._utils.reservoir import Reservoir

Blocks = Literal["all"] | Iterable[int | str]

CHILDREN = ("mlp", "ffn", "feed_forward")  # what blocks call an MLP that is one module
CHUNK = 4096  # tokens that go through an MLP at a time
START_TOKENS = 8192  # for k-means and least squares
HELD_OUT = 0.1  # of the collected tokens, to judge the distilled layer on
WARMUP = 50  # steps


class Distilled(NamedTuple):
    """How well a layer stands in for its MLP; errors are shares of the variance of the MLP's output on held-out tokens.

    Attributes:
        name: Qualified name of the block's MLP.
        tokens: Valid tokens that it was trained on.
        start: Squared error before training, after the start from k-means.
        error: Squared error at the end.
    """

    name: str
    tokens: int
    start: float
    error: float


@dataclass(frozen=True)
class _Site:
    """An MLP: the modules that it consists of by name, in the order in which tokens pass them, and D."""

    places: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    dim: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """The MLP on tokens ``(N, D)``, in evaluation mode and its own dtype; float32 comes out."""
        like = next(self.modules[0].parameters())
        parts = []
        with evaluating(*self.modules):
            for part in torch.split(tokens, CHUNK):
                hidden = part.to(like).unsqueeze(0)  # Hugging Face chunks along a dimension of its own
                for module in self.modules:
                    hidden = module(hidden)
                parts.append(hidden[0].float())
        return torch.cat(parts)


class FeedForwardReplacement:
    """What :func:`replace_feedforward` has exchanged; as a context manager it restores at the end of the block.

    Attributes:
        model: The model.
        parts: The new layers by the name of what they stand for, in the order of the blocks.
    """

    def __init__(self, model: nn.Module, sites: list[_Site], parts: list[nn.Module], mask: str | None) -> None:
        self.model, self.mask = model, mask
        self.parts = {site.places[0]: part for site, part in zip(sites, parts, strict=True)}
        self._sites = {site.places[0]: site for site in sites}
        self._handle: RemovableHandle | None = None
        self._put(self.parts)
        if mask is not None:
            self._handle = model.register_forward_pre_hook(_MaskReader(mask), with_kwargs=True)

    def originals(self) -> dict[str, list[nn.Module]]:
        """The modules of the replaced MLPs, by the same names."""
        return {name: list(site.modules) for name, site in self._sites.items()}

    def restore(self) -> None:
        """Put the MLPs back, on the device, in the dtype and mode of what stood for them; a second call does nothing.

        Raises:
            RuntimeError: If a later replacement of the same MLPs has not been restored.
        """
        if not self.parts:
            return
        for name, part in self.parts.items():
            if self.model.get_submodule(name) is not part:
                raise RuntimeError(
                    f"{name!r} is no longer what this replacement put there, but a "
                    f"{type(self.model.get_submodule(name)).__name__}. Restore later replacements first."
                )
        for name, part in self.parts.items():
            like = next(part.parameters(), next(self._sites[name].modules[0].parameters()))
            for module in self._sites[name].modules:
                module.to(like.device, like.dtype).train(part.training)
        self._take_out()
        if self._handle is not None:
            self._handle.remove()
        self.parts = {}

    def __enter__(self) -> "FeedForwardReplacement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _put(self, parts: Mapping[str, nn.Module]) -> None:
        for name, part in parts.items():
            first, *rest = self._sites[name].places
            self.model.set_submodule(first, part)
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
            self._put(self.parts)


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
    sites = _choose(model, blocks)
    arguments = inspect.signature(model.forward).parameters
    if mask is None:
        mask = "attention_mask" if "attention_mask" in arguments else None
    elif mask not in arguments:
        raise ValueError(f"mask must name an argument of {type(model).__name__}.forward; got {mask!r}.")
    parts = []
    for site in sites:
        like = next(site.modules[0].parameters())
        parts.append(create(site.dim).to(like.device, like.dtype).train(site.modules[0].training))
    if len({id(part) for part in parts}) < len(parts):
        raise ValueError("create must return a new module at each call; got one twice.")
    return FeedForwardReplacement(model, sites, parts, mask)


@torch.no_grad()
def initialize_feedforward(
    replacement: FeedForwardReplacement,
    batches: Iterable[Any],
    *,
    max_tokens: int = START_TOKENS,
    num_restarts: int = 1,
    seed: int = 0,
) -> None:
    """Start every new layer from the valid tokens that its MLP sees in the original model, and what that makes of them.

    See :meth:`DDCLFeedForward.start_from`; a layer of another kind must have that method too.

    Args:
        replacement: What :func:`replace_feedforward` returned.
        batches: Inputs of the model: mappings that become its keyword arguments, tensors, or sequences that start with
            one.
        max_tokens: Size of the sample of each block.
        num_restarts: Runs of k-means per head.
        seed: Seed of sample and k-means.

    Raises:
        ValueError: If there is no valid token, or fewer distinct ones than prototypes.
    """
    _require_parts(replacement)
    with replacement._original_model():
        tokens = _collect(replacement, list(replacement.parts), batches, max_tokens, seed)
    for name, part in replacement.parts.items():
        _start(part, tokens[name], replacement._sites[name](tokens[name]), num_restarts, seed)


def distill_feedforward(
    replacement: FeedForwardReplacement,
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    lr: float = 1e-2,
    batch_tokens: int = 512,
    max_tokens: int = 32_768,
    sequential: bool = True,
    initialize: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> list[Distilled]:
    """Train every new layer to give out what its MLP makes of the valid tokens that reach it, without labels.

    Each layer is trained on its own, on a sample of tokens in memory (AdamW, cosine schedule, squared error); the rest
    of the model stays as it is and runs in evaluation mode.

    Args:
        replacement: What :func:`replace_feedforward` returned.
        batches: See :func:`initialize_feedforward`; read once per block if ``sequential``, else once.
        steps: Steps of AdamW per block, at least 1.
        lr: Largest learning rate, > 0.
        batch_tokens: Tokens per step.
        max_tokens: Size of the sample of each block. It is held twice, once for all blocks if not ``sequential``.
        sequential: Block by block on the tokens of the model as replaced so far, so that a layer is good at the tokens
            that it will get; otherwise all on the tokens of the original model.
        initialize: Start from k-means and least squares first, on up to 8,192 of the tokens; False goes on from where
            the layers are.
        seed: Seed of samples, k-means and order.
        progress: Show a bar per block.

    Returns:
        One :class:`Distilled` per block.

    Raises:
        ValueError: If an argument is out of its range, there are too few valid tokens, or ``batches`` can be read only
            once while several blocks need it.
    """
    for argument, value in (("steps", steps), ("batch_tokens", batch_tokens), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1; got {value}.")
    if not lr > 0:
        raise ValueError(f"lr must be > 0; got {lr}.")
    _require_parts(replacement)
    if sequential and len(replacement.parts) > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches must be readable once per block with sequential=True; got a {type(batches).__name__}, which "
            "ends. Pass a list or a data loader, or set sequential=False."
        )
    names = list(replacement.parts)
    at_once: dict[str, Tensor] = {}
    if not sequential:
        with replacement._original_model():
            at_once = _collect(replacement, names, batches, max_tokens, seed)
    results = []
    for name in names:
        tokens = at_once.pop(name) if at_once else _collect(replacement, [name], batches, max_tokens, seed)[name]
        results.append(_distill(name, replacement, tokens, steps, lr, batch_tokens, initialize, seed, progress))
    return results


def _distill(
    name: str,
    replacement: FeedForwardReplacement,
    tokens: Tensor,
    steps: int,
    lr: float,
    batch_tokens: int,
    initialize: bool,
    seed: int,
    progress: bool,
) -> Distilled:
    part = replacement.parts[name]
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    held_out = max(1, int(HELD_OUT * len(tokens)))
    if len(tokens) < 2:
        raise ValueError(f"batches must give at least 2 valid tokens to {name}; got {len(tokens)}.")
    with torch.no_grad():
        targets = replacement._sites[name](tokens)
    x, y = tokens[held_out:], targets[held_out:]
    like, training = next(part.parameters()), part.training
    dtype = like.dtype
    part.float()
    try:
        if initialize:
            _start(part, x[:START_TOKENS], y[:START_TOKENS], 1, seed)
        first = _relative_error(part, tokens[:held_out], targets[:held_out])
        part.train()
        optimizer = torch.optim.AdamW(part.parameters(), lr=lr, weight_decay=0.0)
        variance = y.var(0, correction=0).mean().clamp(min=torch.finfo(y.dtype).tiny)
        warmup = min(WARMUP, steps // 10)
        with torch.enable_grad():
            for step in tqdm(range(steps), desc=f"distilling {name}", disable=not progress, leave=False):
                for group in optimizer.param_groups:
                    group["lr"] = lr * lr_factor("cosine", step, steps, warmup)
                rows = torch.randint(len(x), (batch_tokens,), generator=generator)
                loss = (part(x[rows].to(like.device)) - y[rows].to(like.device)).square().mean() / variance.to(
                    like.device
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        last = _relative_error(part, tokens[:held_out], targets[:held_out])
    finally:
        part.to(dtype).train(training)
        part.zero_grad()
        if isinstance(part, PlacedPrototypes):
            part.terms = None
    return Distilled(name, len(x), first, last)


@torch.no_grad()
def _relative_error(part: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """Squared error over the variance of the targets."""
    like = next(part.parameters())
    with evaluating(part):
        found = torch.cat([part(rows.to(like)).cpu() for rows in torch.split(tokens, CHUNK)])
    spread = (targets - targets.mean(0)).square().sum().clamp(min=torch.finfo(targets.dtype).tiny)
    return float((found - targets).square().sum() / spread)


def _start(part: nn.Module, tokens: Tensor, targets: Tensor, num_restarts: int, seed: int) -> None:
    start: Any = getattr(part, "start_from", None)
    if start is None:
        raise ValueError(
            f"a layer that is started from data must have start_from(tokens, targets), as DDCLFeedForward; got a "
            f"{type(part).__name__}. Set initialize=False to distill it from where it is."
        )
    like = next(part.parameters())
    start(tokens.to(like), targets.to(like), num_restarts=num_restarts, seed=seed)


def _require_parts(replacement: FeedForwardReplacement) -> None:
    if not replacement.parts:
        raise ValueError("replacement must be in place; got one that was restored. Call replace_feedforward again.")


@torch.no_grad()
def _collect(
    replacement: FeedForwardReplacement, names: list[str], batches: Iterable[Any], max_tokens: int, seed: int
) -> dict[str, Tensor]:
    """A uniform sample of the valid tokens that reach each name, ``(M, D)`` float32 on the CPU."""
    model, reservoirs = replacement.model, {name: Reservoir(max_tokens, seed) for name in names}
    mask: Tensor | None = None

    def read_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal mask
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        given = None if replacement.mask is None else bound.get(replacement.mask)
        mask = None if given is None else given.bool()

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            tokens: Tensor = args[0]
            if mask is None:
                reservoirs[name].add(tokens.flatten(0, -2).float())
            elif mask.shape == tokens.shape[:-1]:
                reservoirs[name].add(tokens[mask].float())
            else:
                raise ValueError(
                    f"mask {replacement.mask!r} must have the shape of the tokens of {name}, "
                    f"{tuple(tokens.shape[:-1])}; got {tuple(mask.shape)}."
                )

        return hook

    device = next(model.parameters()).device
    handles = [model.register_forward_pre_hook(read_mask, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with evaluating(model):
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**{key: _to(value, device) for key, value in batch.items()})
                else:
                    model(_to(batch if isinstance(batch, Tensor) else batch[0], device))
    finally:
        for handle in handles:
            handle.remove()
        for part in replacement.parts.values():
            if isinstance(part, PlacedPrototypes):
                part.terms = part.mask = None
    return {name: reservoir.gather() for name, reservoir in reservoirs.items()}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _choose(model: nn.Module, blocks: Blocks) -> list[_Site]:
    """The MLPs that were asked for."""
    if isinstance(blocks, str) and blocks != "all":
        raise ValueError(f"blocks must be 'all', or a list of numbers or names; got {blocks!r}. Put it in a list.")
    wanted: list[int | str] | None = None if isinstance(blocks, str) else list(blocks)
    found = [] if wanted and all(isinstance(block, str) for block in wanted) else _find(model)
    if wanted is None:
        wanted = list(range(len(found)))
    sites = []
    for block in wanted:
        if isinstance(block, str):
            sites.append(_named(model, block))
        elif -len(found) <= block < len(found):
            sites.append(found[block])
        else:
            raise ValueError(f"blocks must be in [{-len(found)}, {len(found) - 1}] for this model; got {block}.")
    places = [place for site in sites for place in site.places]
    if not sites or len(set(places)) < len(places):
        raise ValueError(f"blocks must name at least one block, and each once; got {wanted}.")
    modules = {id(module) for site in sites for module in site.modules}
    names = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in modules]
    if len(names) > len(modules):
        raise ValueError(f"an MLP must have one name to be replaced; these share theirs: {', '.join(sorted(names))}.")
    return sites


def _find(model: nn.Module) -> list[_Site]:
    """All MLPs that have one of the known forms, in the order of the model."""
    sites: list[_Site] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        first, last = getattr(module, "intermediate", None), getattr(module, "output", None)
        up, down = getattr(first, "dense", None), getattr(last, "dense", None)
        if isinstance(first, nn.Module) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear):
            if up.in_features == down.out_features and up.out_features == down.in_features:
                places = (f"{prefix}intermediate", f"{prefix}output.dense")
                sites.append(_Site(places, (first, down), up.in_features))
            continue
        for child in CHILDREN:
            part = getattr(module, child, None)
            sizes = _sizes(part) if isinstance(part, nn.Module) else None
            if isinstance(part, nn.Module) and sizes is not None and sizes[0] == sizes[1]:
                sites.append(_Site((prefix + child,), (part,), sizes[0]))
    if not sites:
        raise ValueError(
            f"no MLP was found in {type(model).__name__}: looked for blocks with a child "
            f"{', '.join(map(repr, CHILDREN))} of linear layers from D to D, or with 'intermediate.dense' and "
            "'output.dense'. Pass the qualified names of the modules (*, D) -> (*, D) as blocks."
        )
    return sites


def _named(model: nn.Module, name: str) -> _Site:
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
    return _Site((name,), (known[name],), sizes[0])


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Dimension before the first and after the last linear layer."""
    layers: list[tuple[int, int]] = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            layers.append((part.in_features, part.out_features))
        elif type(part).__name__ == "Conv1D":  # GPT-2's linear layer, whose weight is (in, out)
            weight: Any = part.weight
            layers.append((weight.shape[0], weight.shape[1]))
    return (layers[0][0], layers[-1][1]) if layers else None
