"""Checks of what plug-ins set and return, so that a slip is one sentence and no traceback from somewhere else.

They look at types and shapes; at values in evaluation only, so that none waits for an accelerator while training.
Compiled graphs leave them out.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from ddcl_lightning._utils.arguments import described
from ddcl_lightning.backbones.base import Backbone, Tokens
from ddcl_lightning.functional import Decomposition
from ddcl_lightning.heads.base import Head, ReadoutOutput
from ddcl_lightning.nn.quantizer_base import Quantizer, QuantizerOutput, QuantizerTerms

SUM_TOLERANCE = 0.05  # of shares that add up to 1, in half precision
_PACKAGE = __name__.partition(".")[0]


def check_plug_in(owner: nn.Module) -> None:
    """Raise unless a plug-in was initialized, and methods from outside of this package take what they are given.

    Raises:
        TypeError: If it was not, or one does not.
    """
    kind = type(owner)
    if "_modules" not in vars(owner):
        _refuse(
            f"{kind.__name__}.__init__() must call super().__init__()",
            "an object without its layers",
            f"Make it the first line of {kind.__name__}.__init__()",
        )
    for base in kind.__mro__:
        if not inspect.isabstract(base) or not _is_ours(base):
            continue
        for name, method in vars(base).items():
            own = getattr(kind, name)
            if name.startswith("_") or not inspect.isfunction(method) or _is_ours(own):
                continue
            named = list(inspect.signature(method).parameters)[1:]
            try:
                given = inspect.signature(getattr(owner, name))
                given.bind(*named)
            except TypeError:
                _refuse(
                    f"{kind.__name__}.{name}() must take ({', '.join(named)}), which it is called with",
                    f"{name}{given}",
                    "Correct its arguments",
                )


def check_dimension(owner: nn.Module, name: str, meaning: str, where: str) -> int:
    """The integer >= 1 that a plug-in keeps in an attribute.

    Args:
        owner: The plug-in.
        name: Of the attribute.
        meaning: What it is, for the error.
        where: Where to set it.

    Raises:
        TypeError: If there is none, or no such integer.
    """
    value = getattr(owner, name, None)
    if not _is_size(value):
        kind = type(owner).__name__
        raise TypeError(
            f"{kind}.{name} must be an integer of at least 1, {meaning}; got {_value(value)}. Set self.{name} in "
            f"{kind}.{where}."
        )
    return value


def check_created(head: Head, pooled_dim: Any) -> int:
    """``pooled_dim`` as ``create`` of a pooling head has returned it.

    Raises:
        TypeError: If that is no integer >= 1.
    """
    if not _is_size(pooled_dim):
        _refuse(
            f"{type(head).__name__}.create() must return pooled_dim, an integer of at least 1, the dimension of what "
            "pool() returns",
            _value(pooled_dim),
            "End it with return pooled_dim",
        )
    return pooled_dim


def check_built(head: Head, embed_dim: int) -> None:
    """Raise unless ``build`` of a head has left it ready for tokens of dimension ``embed_dim``.

    Raises:
        TypeError: If it has no ``pooled_dim``, or its base was not built.
    """
    kind = type(head).__name__
    check_dimension(head, "pooled_dim", "the dimension of the readout's pooled", "build()")
    if head.input_dim != embed_dim:
        _refuse(
            f"{kind}.build() must call super().build(embed_dim), which keeps input_dim = {embed_dim}",
            f"input_dim = {head.input_dim}",
            f"Call it in {kind}.build()",
        )


def check_quantizer(head: Head, quantizer: Any) -> None:
    """Raise unless a head of codes holds a quantizer that knows its sizes.

    Raises:
        TypeError: If it does not.
    """
    if not isinstance(quantizer, Quantizer):
        rule = f"{type(head).__name__}.create() must return a Quantizer"
        _refuse(rule, described(quantizer), "End it with return quantizer")
    check_plug_in(quantizer)
    check_dimension(quantizer, "dim", "the dimension of the tokens that it takes", "__init__()")
    check_dimension(quantizer, "num_codes", "the codes of each codebook", "__init__()")


def check_token_output(backbone: Backbone, output: Any) -> Tokens:
    """Tokens as a backbone has returned them for a batch.

    Raises:
        TypeError: If that is not ``Tokens`` of floating-point values and a boolean mask.
        ValueError: If a shape does not fit.
    """
    if torch.compiler.is_compiling():
        return output  # type: ignore[no-any-return]
    rule = f"{type(backbone).__name__}.forward() must return Tokens(values, mask)"
    if not isinstance(output, Tokens):
        _refuse(rule, described(output), "Wrap what it returns: Tokens(values), or Tokens(values, mask)")
    values, mask, embed_dim = *output, backbone.embed_dim
    if not isinstance(values, Tensor) or not values.is_floating_point():
        _refuse(f"{rule} with floating-point values", described(values), "Convert them with values.float()")
    if values.dim() != 3 or values.shape[-1] != embed_dim:
        raise ValueError(
            f"{rule} with values (B, T, embed_dim = {embed_dim}); got {described(values)}. Set embed_dim to the "
            "dimension of the tokens; a single vector per sample is values.unsqueeze(1)."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        _refuse(f"{rule} with a boolean mask or None", described(mask), "Convert it, to True for valid tokens")
    if mask is not None and mask.shape != values.shape[:2]:
        raise ValueError(
            f"{rule} with a mask (B, T) = {tuple(values.shape[:2])}; got {described(mask)}. Give one entry per token."
        )
    return output


def check_readout_output(head: Head, tokens: Tensor, output: Any) -> ReadoutOutput:
    """Readout as a head has returned it for ``(B, T, embed_dim)`` tokens.

    Raises:
        TypeError: If that is not a ``ReadoutOutput`` with fields of the right types.
        ValueError: If a shape does not fit.
    """
    if torch.compiler.is_compiling():
        return output  # type: ignore[no-any-return]
    rule = f"{type(head).__name__}.forward() must return ReadoutOutput(tokens, pooled, ...)"
    if not isinstance(output, ReadoutOutput):
        _refuse(rule, described(output), "Wrap what it returns: ReadoutOutput(tokens, pooled)")
    batch, pooled_dim = tokens.shape[0], head.pooled_dim
    _require_rows(f"{rule} with tokens (B = {batch}, T, ...)", output.tokens, batch, 2)
    _require_rows(f"{_pooled_rule(head, rule)} (B = {batch}, pooled_dim = {pooled_dim})", output.pooled, batch, 2)
    if output.pooled.shape != (batch, pooled_dim):
        raise ValueError(
            f"{_pooled_rule(head, rule)} (B = {batch}, pooled_dim = {pooled_dim}); got {described(output.pooled)}. "
            f"{_pooled_remedy(head)}"
        )
    if not output.pooled.is_floating_point():
        _refuse(
            f"{_pooled_rule(head, rule)} of floating-point values", described(output.pooled), "Convert it with .float()"
        )
    terms = output.loss_terms
    if not isinstance(terms, (list, tuple)) or isinstance(terms, Decomposition) or not _all(Decomposition, terms):
        given = "a Decomposition" if isinstance(terms, Decomposition) else described(terms)
        rule = f"{rule} with loss_terms, a list of the Decomposition of each level"
        _refuse(rule, given, "Write loss_terms=[output.terms], [] without prototypes")
    if output.assignments is not None:
        _require_rows(f"{rule} with assignments (B = {batch}, H, K) or None", output.assignments, batch, 3)
    if output.codes is not None:
        _require_rows(f"{rule} with codes (B = {batch}, T, H) or None", output.codes, batch, 3)
    _require_scalar(f"{rule} with regularization, a scalar tensor or None", output.regularization)
    _require_signals(rule, output.signals)
    return output


def check_quantizer_output(quantizer: Quantizer, tokens: Tensor, output: Any) -> QuantizerOutput:
    """Output as a quantizer has returned it for ``(B, T, D)`` tokens.

    Raises:
        TypeError: If that is not a ``QuantizerOutput`` with fields of the right types.
        ValueError: If a shape does not fit.
    """
    if torch.compiler.is_compiling():
        return output  # type: ignore[no-any-return]
    rule = f"{type(quantizer).__name__}.forward() must return QuantizerOutput(quantized, indices, ...)"
    if not isinstance(output, QuantizerOutput):
        _refuse(rule, described(output), "Return QuantizerOutput(quantized, indices, QuantizerTerms(loss))")
    shape, books = tuple(tokens.shape[:2]), quantizer.num_codebooks
    for name, value, last in (
        ("quantized", output.quantized, (quantizer.output_dim,)),
        ("indices", output.indices, (books,) if books > 1 else ()),
    ):
        if not isinstance(value, Tensor) or value.is_floating_point() != (name == "quantized"):
            kind = "floating-point" if name == "quantized" else "integer"
            _refuse(f"{rule} with {kind} {name}", described(value), "Convert it")
        if value.shape != (*shape, *last):
            raise ValueError(
                f"{rule} with {name} {(*shape, *last)}; got {described(value)}. Reshape it, or correct output_dim or "
                f"num_codebooks of {type(quantizer).__name__}."
            )
    if not isinstance(output.terms, QuantizerTerms):
        _refuse(f"{rule} with terms, a QuantizerTerms", described(output.terms), "Write QuantizerTerms(loss)")
    _require_scalar(f"{rule} with terms.loss, a scalar tensor or None", output.terms.loss)
    _require_signals(rule, output.terms.signals)
    return output


def check_code_range(quantizer: Quantizer, codes: Tensor) -> None:
    """Raise unless all codes are in [0, ``num_codes``), or -1; for evaluation, since it waits for the device.

    Raises:
        ValueError: If one is not.
    """
    if torch.compiler.is_compiling() or codes.is_meta or not codes.numel():
        return
    low, high = (int(value) for value in codes.aminmax())
    if low < -1 or high >= quantizer.num_codes:
        kind = type(quantizer).__name__
        raise ValueError(
            f"{kind}.forward() must return indices in [0, num_codes = {quantizer.num_codes}), or -1 for padding; got "
            f"values from {low} to {high}. Set num_codes of {kind} to the size of its codebook, or correct the indices."
        )


def check_assignments(head: Head, assignments: Tensor | None, mask: Tensor | None) -> None:
    """Raise unless assignments of samples with a valid token are shares; for evaluation, since it waits for the device.

    Raises:
        ValueError: If one is not finite, or the shares of a sample in a head do not add up to 1.
    """
    if assignments is None or torch.compiler.is_compiling() or assignments.is_meta:
        return
    rows = (assignments if mask is None else assignments[mask.any(1)]).detach().float()
    rule = f"{type(head).__name__}.forward() must return assignments (B, H, K), the share of every prototype"
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(
            f"{rule}; got NaN or infinite values in {described(assignments)}. Leave padding out of the mean."
        )
    sums = rows.sum(-1)
    if not bool(((sums - 1).abs() < SUM_TOLERANCE).all()):
        raise ValueError(
            f"{rule}, which add up to 1 over the last dimension; got sums from {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g} in {described(assignments)}. Put the K prototypes last (.mT where they come "
            "first), and divide by the number of valid tokens."
        )


def check_losses(task: nn.Module, losses: Any) -> Mapping[str, Tensor]:
    """Losses as a task has returned them.

    Raises:
        TypeError: If that is no dictionary of tensors.
        ValueError: If it has no ``"loss"``, or a loss is no scalar.
    """
    rule = f"{type(task).__name__}.losses() must return a dict of scalar tensors with 'loss', which trains"
    if not isinstance(losses, Mapping):
        _refuse(rule, described(losses), "Return {'loss': loss}")
    if "loss" not in losses:
        raise ValueError(f"{rule}; got the names {sorted(map(str, losses))}. Name the one that trains 'loss'.")
    for name, value in losses.items():
        if not isinstance(value, Tensor):
            _refuse(rule, f"{described(value)} under {name!r}", "Return tensors")
        if value.dim():
            raise ValueError(f"{rule}; got {described(value)} under {name!r}. Reduce it with .mean().")
    return losses


def check_columns(task: nn.Module, columns: Any, size: int) -> Mapping[str, Tensor]:
    """Columns as ``predict`` of a task has returned them for ``size`` samples.

    Raises:
        TypeError: If that is no dictionary of tensors with one entry per sample.
    """
    rule = f"{type(task).__name__}.predict() must return a dict of columns (B = {size},)"
    if not isinstance(columns, Mapping):
        _refuse(rule, described(columns), "Return {'name': column}")
    for name, value in columns.items():
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            _refuse(rule, f"{described(value)} under {name!r}", "Return one entry per sample")
    return columns


def _pooled_rule(head: Head, rule: str) -> str:
    """Rule for ``pooled``, by the method that its author has written."""
    return f"{type(head).__name__}.pool() must return a tensor" if _makes_by_create(head) else f"{rule} with pooled"


def _pooled_remedy(head: Head) -> str:
    if _makes_by_create(head):
        return "Return its last dimension from create(), or reduce it over the tokens."
    return "Set self.pooled_dim in build() to its last dimension, or reduce it over the tokens."


def _makes_by_create(head: Head) -> bool:
    return all(hasattr(head, name) for name in ("create", "pool"))  # a PoolingHead, which imports this module


def _refuse(rule: str, given: str, remedy: str) -> NoReturn:
    raise TypeError(f"{rule}; got {given}. {remedy}.")


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == _PACKAGE


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _value(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _all(kind: type, values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _require_rows(rule: str, value: Any, rows: int, dimensions: int) -> None:
    """Raise unless a value is a tensor of so many rows and at least so many dimensions."""
    if not isinstance(value, Tensor):
        _refuse(rule, described(value), "Return a tensor")
    if value.dim() < dimensions or value.shape[0] != rows:
        raise ValueError(f"{rule}; got {described(value)}. Keep the dimension of the samples first.")


def _require_scalar(rule: str, value: Any) -> None:
    if value is not None and (not isinstance(value, Tensor) or value.dim()):
        _refuse(rule, described(value), "Reduce it with .mean(), or leave it out")


def _require_signals(rule: str, signals: Any) -> None:
    if not isinstance(signals, Mapping) or not _all(Tensor, signals.values()):
        _refuse(f"{rule} with signals, a dict of tensors", described(signals), "Return {'name': value.detach()}")
