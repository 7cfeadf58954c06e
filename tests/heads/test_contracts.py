"""The usual slips of contributors, and the sentence that each ends in: class, rule, value and remedy."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tiny import LinearBackbone, loader, quiet_trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from ddcl_lightning import (
    Backbone,
    Classification,
    DDCLReadoutModule,
    Decoder,
    Head,
    MeanPooling,
    PoolingHead,
    PrototypeBank,
    Quantizer,
    QuantizerOutput,
    QuantizerReadout,
    QuantizerTerms,
    ReadoutOutput,
    Reconstruction,
    Task,
    Tokens,
    VectorQuantizer,
)

BATCH = next(iter(loader(batch_size=2)))  # two samples, so that a tensor would be unpacked into tokens and mask
Change = Callable[[Any], Any]


class Strips(Backbone):
    """A backbone that changes what it returns."""

    def __init__(self, change: Change = lambda tokens: tokens, embed_dim: Any = 3) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 3), change
        if embed_dim is not None:
            self.embed_dim = embed_dim

    def forward(self, batch: Any) -> Tokens:
        tokens: Tokens = self.change(Tokens(self.linear(batch["x"]).unsqueeze(1)))
        return tokens


class Nearest(Head):
    """A head that changes what it returns."""

    def __init__(self, change: Change = lambda output: output, pooled_dim: Any = 3, built: bool = True) -> None:
        super().__init__()
        self.change, self.width, self.built = change, pooled_dim, built

    def build(self, embed_dim: int) -> None:
        if self.built:
            super().build(embed_dim)
        self.bank = PrototypeBank(4, embed_dim)
        if self.width is not None:
            self.pooled_dim = self.width

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> ReadoutOutput:
        output = self.bank(tokens, mask)
        readout = ReadoutOutput(output.centroids, output.centroids.mean(1), [output.terms])
        changed: ReadoutOutput = self.change(readout)
        return changed


class Width(PoolingHead):
    """A head without prototypes whose ``create`` returns what it was given."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def create(self, embed_dim: int, width: int | None) -> int:
        return self.returned  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return tokens.mean(1)


class Loss(Task):
    """A task that changes its losses."""

    def __init__(self, change: Change = lambda losses: losses, columns: Any = None) -> None:
        super().__init__()
        self.change, self.columns = change, columns

    def losses(self, readout: ReadoutOutput, batch: Any) -> Mapping[str, Tensor]:
        losses: Mapping[str, Tensor] = self.change({"loss": readout.quantization_loss()})
        return losses

    def predict(self, readout: ReadoutOutput, batch: Any) -> dict[str, Tensor]:
        return self.columns  # type: ignore[no-any-return]


class Codes(Quantizer):
    """A quantizer that changes what it returns."""

    def __init__(self, change: Change = lambda output: output, **sizes: Any) -> None:
        super().__init__()
        self.inner, self.change = VectorQuantizer(3, 4), change
        for name, value in ({"dim": 3, "num_codes": 4} | sizes).items():
            if value is not None:
                setattr(self, name, value)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        output: QuantizerOutput = self.change(self.inner(tokens, mask))
        return output


class Pair(Decoder):
    """A decoder that returns two tensors."""

    def build(self, token_dim: int) -> None:
        self.linear = nn.Linear(token_dim, 4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(tokens), mask  # type: ignore[return-value]


class Rounded(Width):
    def pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return tokens.mean(1).long()


class Unmasked(Width):
    def pool(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return tokens.mean(1)


class UnmaskedCodes(Codes):
    def forward(self, tokens: Tensor) -> QuantizerOutput:  # type: ignore[override]
        return super().forward(tokens)


class UnmaskedPair(Pair):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return tokens


class Unbatched(Loss):
    def update_metrics(self, metrics: Any, readout: ReadoutOutput) -> None:  # type: ignore[override]
        pass


def module(backbone: Backbone | None = None, head: Head | None = None, task: Task | None = None) -> DDCLReadoutModule:
    return DDCLReadoutModule(backbone or LinearBackbone(), head or Nearest(), task or Loss())


def codes(change: Change) -> Callable[[], Any]:
    return lambda: module(head=QuantizerReadout(Codes(change)))(BATCH)


def readout(**fields: Any) -> Change:
    return lambda output: ReadoutOutput(**{**vars(output), **fields})


def losses(change: Change) -> Callable[[], Any]:
    model = module(task=Loss(change))
    return lambda: model.losses(model(BATCH), BATCH)


SLIPS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no embed_dim": (
        lambda: module(Strips(embed_dim=None)),
        TypeError,
        r"Strips.embed_dim must be an integer .*; got nothing\. Set self.embed_dim in Strips.__init__\(\)",
    ),
    "an embed_dim of letters": (lambda: module(Strips(embed_dim="3")), TypeError, "Strips.embed_dim .*; got '3'"),
    "another embed_dim": (
        lambda: module(Strips(embed_dim=5), MeanPooling(), Classification(4))(BATCH),
        ValueError,
        r"Strips.forward\(\) must return .* values \(B, T, embed_dim = 5\); got a tensor \(2, 1, 3\)",
    ),
    "a tensor for tokens": (
        lambda: module(Strips(lambda tokens: tokens.values))(BATCH),
        TypeError,
        r"Strips.forward\(\) must return Tokens\(values, mask\); got a tensor \(2, 1, 3\).*Wrap what it returns",
    ),
    "a pair for tokens": (lambda: module(Strips(tuple))(BATCH), TypeError, r"must return Tokens.*; got a tuple of 2"),
    "flat tokens": (
        lambda: module(Strips(lambda tokens: Tokens(tokens.values[:, 0])))(BATCH),
        ValueError,
        r"got a tensor \(2, 3\) .*values.unsqueeze\(1\)",
    ),
    "tokens of integers": (
        lambda: module(Strips(lambda tokens: Tokens(tokens.values.long())))(BATCH),
        TypeError,
        "with floating-point values; got a tensor .* of torch.int64",
    ),
    "a mask of integers": (
        lambda: module(Strips(lambda tokens: Tokens(tokens.values, torch.ones(2, 1).long())))(BATCH),
        TypeError,
        "with a boolean mask or None; got a tensor",
    ),
    "a mask of another shape": (
        lambda: module(Strips(lambda tokens: Tokens(tokens.values, torch.ones(2).bool())))(BATCH),
        ValueError,
        r"with a mask \(B, T\) = \(2, 1\); got a tensor \(2,\)",
    ),
    "no pooled_dim": (
        lambda: module(head=Nearest(pooled_dim=None)),
        TypeError,
        r"Nearest.pooled_dim must be an integer .*; got nothing\. Set self.pooled_dim in Nearest.build\(\)",
    ),
    "another pooled_dim": (
        lambda: module(head=Nearest(pooled_dim=7))(BATCH),
        ValueError,
        r"Nearest.forward\(\) must return .*pooled_dim = 7\); got a tensor \(2, 3\) .*Set self.pooled_dim",
    ),
    "super().build forgotten": (
        lambda: module(head=Nearest(built=False)),
        TypeError,
        r"Nearest.build\(\) must call super\(\).build\(embed_dim\), .*; got input_dim = None",
    ),
    "a tensor for the readout": (
        lambda: module(head=Nearest(lambda output: output.pooled))(BATCH),
        TypeError,
        r"Nearest.forward\(\) must return ReadoutOutput\(tokens, pooled, ...\); got a tensor \(2, 3\)",
    ),
    "loss terms that are no list": (
        lambda: module(head=Nearest(lambda output: readout(loss_terms=output.loss_terms[0])(output)))(BATCH),
        TypeError,
        r"loss_terms, a list .*; got a Decomposition\. Write loss_terms=\[output.terms\]",
    ),
    "loss terms that are a tensor": (
        lambda: module(head=Nearest(readout(loss_terms=torch.ones(1))))(BATCH),
        TypeError,
        "loss_terms, a list .*; got a tensor",
    ),
    "a regularization of each sample": (
        lambda: module(head=Nearest(readout(regularization=torch.ones(2))))(BATCH),
        TypeError,
        r"regularization, a scalar tensor or None; got a tensor \(2,\)",
    ),
    "signals that are a tensor": (
        lambda: module(head=Nearest(readout(signals=torch.ones(2))))(BATCH),
        TypeError,
        "signals, a dict of tensors; got a tensor",
    ),
    "codes of flat tokens": (
        lambda: module(head=Nearest(readout(codes=torch.ones(2, 1).long())))(BATCH),
        ValueError,
        r"codes \(B = 2, T, H\) or None; got a tensor \(2, 1\)",
    ),
    "create returns None": (
        lambda: module(head=Width(None), task=Classification(4)),
        TypeError,
        r"Width.create\(\) must return pooled_dim, .*; got nothing\. End it with return pooled_dim",
    ),
    "create returns another width": (
        lambda: module(head=Width(9), task=Classification(4))(BATCH),
        ValueError,
        r"Width.pool\(\) must return a tensor \(B = 2, pooled_dim = 9\); got a tensor \(2, 3\) .*from create\(\)",
    ),
    "pooled of integers": (
        lambda: module(head=Nearest(lambda output: readout(pooled=output.pooled.long())(output)))(BATCH),
        TypeError,
        r"Nearest.forward\(\) must return .* with pooled of floating-point values; got a tensor .* of torch.int64",
    ),
    "a pooling of integers": (
        lambda: module(head=Rounded(3), task=Classification(4))(BATCH),
        TypeError,
        r"Rounded.pool\(\) must return a tensor of floating-point values; got .* of torch.int64\. Convert it",
    ),
    "a head without mask": (
        lambda: module(head=Unmasked(3)),
        TypeError,
        r"Unmasked.pool\(\) must take \(tokens, mask\), .*; got pool\(tokens.*\. Correct its arguments",
    ),
    "a quantizer without mask": (
        lambda: QuantizerReadout(UnmaskedCodes()),
        TypeError,
        r"UnmaskedCodes.forward\(\) must take \(tokens, mask\), .*; got forward\(tokens",
    ),
    "a decoder without mask": (
        lambda: Reconstruction(UnmaskedPair()),
        TypeError,
        r"UnmaskedPair.forward\(\) must take \(tokens, mask\)",
    ),
    "a task that reads no batch": (
        lambda: module(task=Unbatched()),
        TypeError,
        r"Unbatched.update_metrics\(\) must take \(metrics, readout, batch\), .*; got update_metrics\(metrics",
    ),
    **{
        f"{base.__name__} that is not initialized": (
            lambda base=base, use=use: use(type("Forgetful", (base,), {"__init__": lambda self: None})()),
            TypeError,
            r"Forgetful.__init__\(\) must call super\(\).__init__\(\); got an object without its layers\. Make it",
        )
        for base, use in (
            (Strips, module),
            (Nearest, lambda head: module(head=head)),
            (Width, lambda head: module(head=head)),
            (Loss, lambda task: module(task=task)),
            (Codes, QuantizerReadout),
            (Pair, Reconstruction),
        )
    },
    "a tuple for quantizer output": (
        codes(tuple),
        TypeError,
        r"Codes.forward\(\) must return QuantizerOutput\(quantized, indices, ...\); got a tuple of 3",
    ),
    "indices with one codebook of their own": (
        codes(lambda output: output._replace(indices=output.indices.unsqueeze(-1))),
        ValueError,
        r"with indices \(2, 1\); got a tensor \(2, 1, 1\)",
    ),
    "indices that are no integers": (
        codes(lambda output: output._replace(indices=output.indices.float())),
        TypeError,
        "with integer indices; got a tensor",
    ),
    "quantized of another width": (
        codes(lambda output: output._replace(quantized=output.quantized[..., :2])),
        ValueError,
        r"with quantized \(2, 1, 3\); got a tensor \(2, 1, 2\)",
    ),
    "a loss of each token": (
        codes(lambda output: output._replace(terms=QuantizerTerms(torch.ones(2)))),
        TypeError,
        r"loss, a scalar tensor or None; got a tensor \(2,\)",
    ),
    "no num_codes": (
        lambda: QuantizerReadout(Codes(num_codes=None)),
        TypeError,
        "Codes.num_codes must be an integer .*; got nothing",
    ),
    "no loss": (
        losses(lambda losses: {"error": losses["loss"]}),
        ValueError,
        r"Loss.losses\(\) must return a dict .*'loss'.*; got the names \['error'\]",
    ),
    "a bare loss": (
        losses(lambda losses: losses["loss"]),
        TypeError,
        r"Loss.losses\(\) must return a dict .*; got a tensor \(\) .*Return {'loss': loss}",
    ),
    "a loss of each sample": (
        losses(lambda losses: {"loss": losses["loss"] * torch.ones(2)}),
        ValueError,
        r"got a tensor \(2,\) of torch.float32 under 'loss'\. Reduce it with .mean\(\)",
    ),
    "a loss that is a number": (losses(lambda losses: {**losses, "n": 1.0}), TypeError, "got a float under 'n'"),
    "predictions without a dict": (
        lambda: module(task=Loss(columns=torch.ones(2))).predict_step(BATCH, 0),
        TypeError,
        r"Loss.predict\(\) must return a dict of columns \(B = 2,\); got a tensor",
    ),
    "predictions of another length": (
        lambda: module(task=Loss(columns={"n": torch.ones(1)})).predict_step(BATCH, 0),
        TypeError,
        r"got a tensor \(1,\) of torch.float32 under 'n'",
    ),
    "a pair for decoded": (
        lambda: module(head=MeanPooling(), task=Reconstruction(Pair())).losses(
            module(head=MeanPooling(), task=Loss())(BATCH), BATCH
        ),
        TypeError,
        r"Pair.forward\(\) must return a tensor.*; got a tuple of 2",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_of_a_contributor_is_one_sentence(name: str) -> None:
    action, error, message = SLIPS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        action()


@pytest.mark.parametrize("stage", ["", "train_"])
def test_metrics_that_nothing_updates_are_refused_when_the_module_is_made(stage: str) -> None:
    def metrics(self: Task) -> Mapping[str, Metric]:
        return {"mean": MeanMetric()}

    silent = type("Silent", (Loss,), {f"{stage}metrics": metrics})
    with pytest.raises(TypeError, match=rf"Silent must write update_{stage}metrics\(metrics, readout, batch\)"):
        module(task=silent())
    loud = type("Loud", (silent,), {f"update_{stage}metrics": lambda *_: None})
    module(task=loud())


def test_slips_are_told_by_a_fit_too() -> None:
    with pytest.raises(TypeError, match=r"Strips.forward\(\) must return Tokens"):
        quiet_trainer(max_epochs=1).fit(module(Strips(lambda tokens: tokens.values)), loader(batch_size=2))


def test_checks_read_no_values() -> None:
    """Nothing waits for an accelerator: tensors without values pass, which cannot be read."""
    model = DDCLReadoutModule(LinearBackbone(), MeanPooling(), Classification(4, quantization_weight=0.0)).to("meta")
    output = model({"x": BATCH["x"].to("meta")})
    assert output.pooled.device.type == "meta"


VALUES: dict[str, tuple[Callable[[], Head], str]] = {
    "codes out of range": (
        lambda: QuantizerReadout(Codes(lambda output: output._replace(indices=output.indices + 4))),
        r"Codes.forward\(\) must return indices in \[0, num_codes = 4\), .*; got values from \d to \d. Set num_codes",
    ),
    "assignments the other way round": (
        lambda: Nearest(readout(assignments=torch.full((2, 4, 1), 0.25))),
        r"add up to 1 over the last dimension; got sums from 0.25 to 0.25 in a tensor \(2, 4, 1\).*\.mT",
    ),
    "no assignments": (lambda: Nearest(readout(assignments=torch.full((2, 1, 4), torch.nan))), "got NaN or infinite"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_checked_in_evaluation_and_not_in_training(name: str) -> None:
    head, message = VALUES[name]
    model = module(head=head())
    model(BATCH)
    with pytest.raises(ValueError, match=message):
        model.eval()(BATCH)
