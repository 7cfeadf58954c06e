import re

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from toys import QUIET, Project, blobs, fit

from ddcl_lightning import (
    Classification,
    Clustering,
    DDCLReadout,
    DDCLReadoutModule,
    Head,
    IdentityBackbone,
    PCABackbone,
    PrototypeBank,
    ReadoutOutput,
    Reconstruction,
    SequenceDecoder,
)
from ddcl_lightning.callbacks import (
    CollapseWarning,
    DecompositionCheck,
    FitSummary,
    KMeansInitialization,
    TemperatureAnnealing,
)
from ddcl_lightning.callbacks import fit_summary as summary_module
from ddcl_lightning.datamodules.digits import DigitsDataModule
from ddcl_lightning.heads import VQPooling


def rows_of(size=64, labelled=True, masked=False):
    x, y = blobs(size)
    rows = []
    for place in range(size):
        row = {"x": x[place], "index": torch.tensor(place)}
        if masked:
            padding = 1e3 * torch.randn(4, generator=torch.Generator().manual_seed(place))
            row["x"] = torch.stack([x[place], x[place] + 0.1, padding])
            row["mask"] = torch.tensor([True, True, False])
        if labelled:
            row["y"] = y[place]
        rows.append(row)
    return DataLoader(rows, batch_size=16)


def module(backbone=None, head=None, task=None, **kwargs):
    return DDCLReadoutModule(
        backbone or IdentityBackbone(4), head or DDCLReadout(4), task or Clustering(num_classes=4), **kwargs
    )


def run(model, summary, *callbacks, train=None, val=None, **kwargs):
    trainer = pl.Trainer(
        callbacks=[KMeansInitialization(), TemperatureAnnealing(), *callbacks, summary],
        **{**QUIET, "max_epochs": 2, **kwargs},
    )
    trainer.fit(model, train or rows_of(), val)
    return trainer


def test_the_table_is_printed_once_with_its_rows(capsys):
    summary = FitSummary()
    run(module(), summary, DecompositionCheck(every_n_batches=1), val=rows_of())
    printed = capsys.readouterr().out
    assert printed.count("prototypes (last step)") == 1
    assert summary.table in printed
    assert list(summary.rows) == ["prototypes (last step)", "k-means, features"]
    assert all(row["acc"] == row["nmi"] == row["usage"] == 1.0 for row in summary.rows.values())
    assert "Delta" in printed
    assert "decomposition: 0 violations in 8 checks" in printed


def test_the_verdict_on_every_codebook_follows_the_table(capsys):
    watch = CollapseWarning(every_n_batches=1)
    run(module(head=DDCLReadout(4, num_heads=2)), FitSummary(), watch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health of ")]
    assert lines == [f"health of {line}" for line in watch.verdict().splitlines()]
    assert [line.split(": ")[0] for line in lines] == [f"health of head.attention.bank/head{head}" for head in (0, 1)]
    assert "perplexity " in lines[0]
    run(module(), FitSummary())
    assert "health of codebooks: not watched (add CollapseWarning)" in capsys.readouterr().out


def test_figures_agree_with_the_run(capsys):
    summary = FitSummary()
    trainer = pl.Trainer(callbacks=[KMeansInitialization(), TemperatureAnnealing(), summary], max_epochs=3, **QUIET)
    model = module(PCABackbone(64, 16, trainable=True), DDCLReadout(10), Clustering(num_classes=10))
    trainer.fit(model, datamodule=DigitsDataModule())
    assert summary.rows["prototypes (last step)"]["acc"] == pytest.approx(float(trainer.callback_metrics["val/acc"]))
    rows = ["prototypes (last step)", "k-means, bank inputs", "k-means, features before training"]
    assert list(summary.rows) == rows
    # Whitening changes what k-means finds, so the rows differ.
    assert 0.7 < summary.rows[rows[2]]["acc"] < summary.rows[rows[1]]["acc"] < 0.95
    assert "decomposition: not checked" in capsys.readouterr().out


CASES = {
    "no labels": (lambda: module(task=Clustering()), {"train": rows_of(labelled=False)}, 3),
    "no validation data": (module, {}, 5),
    "sequences with masks": (module, {"train": rows_of(masked=True), "val": rows_of(masked=True)}, 5),
    "no validation yet": (module, {"val": rows_of(), "check_val_every_n_epoch": 10}, 5),
    "several validation loaders": (
        lambda: module(task=Clustering()),
        {"val": [rows_of(), rows_of(32)], "limit_val_batches": 0},
        5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_takes_any_data(name, capsys):
    make, data, figures = CASES[name]
    summary = FitSummary()
    run(make(), summary, **data)
    assert len(summary.rows["prototypes (last step)"]) == figures
    assert len(summary.rows["k-means, features"]) == figures
    assert summary.table in capsys.readouterr().out


def test_it_describes_what_validation_saw(capsys):
    sizes = []

    class Seen(IdentityBackbone):
        def forward(self, batch):
            if not self.training:
                sizes.append(len(batch["x"]))
            return super().forward(batch)

    class FromValidationOn(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            sizes.clear()

    limits = {"limit_val_batches": 2, "check_val_every_n_epoch": 2}
    run(module(Seen(4)), FitSummary(), FromValidationOn(), val=rows_of(64), **limits)
    assert sizes == [16, 16, 16, 16]  # two batches of validation, the same two for the summary


def test_padding_is_in_no_feature(capsys):
    summary = FitSummary()
    run(module(), summary, train=rows_of(masked=True))
    assert summary.rows["k-means, features"]["acc"] == 1.0


def test_several_heads_have_a_row_each(capsys):
    summary = FitSummary()
    run(module(head=DDCLReadout(4, num_heads=2)), summary)
    assert list(summary.rows)[:2] == ["prototypes (last step), head 0", "prototypes (last step), head 1"]
    assert "head 1: Delta" in capsys.readouterr().out


def test_a_classifier_is_named(capsys):
    summary = FitSummary()
    run(module(task=Classification(num_classes=4)), summary, val=rows_of())
    assert "classifier val/acc" in capsys.readouterr().out


def test_an_autoencoder_has_a_line_of_its_own(capsys):
    summary = FitSummary()
    task = Reconstruction(SequenceDecoder(4), quantization_weight=0.0)
    trainer = pl.Trainer(callbacks=[summary], max_epochs=1, **QUIET)
    trainer.fit(module(head=VQPooling(5), task=task), rows_of(), rows_of())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reconstruction (val): "))
    shown = dict(entry.split() for entry in line.removeprefix("reconstruction (val): ").split(", "))
    assert list(shown) == ["mse", "usage", "perplexity", "soft_perplexity"]  # vectors have no PSNR
    for name, value in shown.items():
        assert float(value) == pytest.approx(float(trainer.callback_metrics[f"val/{name}"]), rel=1e-3)


def test_targets_that_are_no_classes_are_no_labels(capsys):
    class Regression(Clustering):
        pass

    rows = [{"x": x, "y": x[0]} for x in blobs(64)[0]]
    summary = FitSummary()
    run(module(task=Regression()), summary, train=DataLoader(rows, batch_size=16))
    assert set(summary.rows["prototypes (last step)"]) == {"r2", "usage", "perplexity"}


def test_fewer_distinct_samples_than_prototypes_leave_the_baseline_out(capsys):
    rows = [{"x": torch.stack([torch.eye(4)[i] for i in range(4)])} for _ in range(32)]  # one distinct mean
    summary = FitSummary()
    run(module(task=Clustering()), summary, train=DataLoader(rows, batch_size=16))
    assert summary.rows["k-means, features"] == {}
    assert "prototypes (last step)" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["collect_readouts", "read_signals", "kmeans_scores", "clustering_scores"])
def test_a_failure_of_the_summary_costs_no_run(place, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(summary_module, place, fail)
    model = module(PCABackbone(4, 4, trainable=True))
    message = (
        "^FitSummary skipped (a row of )?its table because of an error; training is not affected. RuntimeError: boom"
    )
    with pytest.warns(UserWarning, match=message):
        trainer = run(model, FitSummary(), val=rows_of())
    assert trainer.state.finished
    assert trainer.global_step == 8


def test_it_changes_nothing_in_the_run(capsys):
    def final(enabled):
        pl.seed_everything(0, verbose=False)
        model = module(PCABackbone(64, 8, trainable=True), DDCLReadout(10), Clustering(num_classes=10))
        model.backbone.extra = torch.nn.Dropout(0.5)
        callbacks = [KMeansInitialization(), FitSummary(enabled), Frozen()]
        trainer = pl.Trainer(callbacks=callbacks, max_epochs=2, **QUIET)
        trainer.fit(model, datamodule=DigitsDataModule())
        return model.head.attention.bank.prototypes.detach(), torch.rand(3), model.backbone.extra.training

    class Frozen(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.backbone.extra.eval()

    with_it, without = final(True), final(False)
    assert torch.equal(with_it[0], without[0])
    assert torch.equal(with_it[1], without[1])
    assert with_it[2] is without[2] is False


def test_the_baseline_from_before_training_survives_a_restart(tmp_path, capsys):
    model = module(PCABackbone(4, 4, trainable=True))
    first, second = FitSummary(), FitSummary()
    run(model, first, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    trainer = pl.Trainer(callbacks=[KMeansInitialization(), TemperatureAnnealing(), second], max_epochs=2, **QUIET)
    trainer.fit(module(PCABackbone(4, 4, trainable=True)), rows_of(), ckpt_path=tmp_path / "one.ckpt")
    key = "k-means, features before training"
    assert second.rows[key] == first.rows[key]


class Mean(Head):
    """A head without prototypes."""

    def build(self, embed_dim):
        super().build(embed_dim)
        self.pooled_dim = embed_dim

    def forward(self, tokens, mask=None):
        return ReadoutOutput(tokens, tokens.mean(1))


def test_a_head_without_prototypes_is_compared_too(capsys):
    summary = FitSummary(compare=True)
    model = module(head=Mean(), task=Classification(num_classes=4, quantization_weight=0.0))
    pl.Trainer(callbacks=[summary], max_epochs=1, **QUIET).fit(model, rows_of(), rows_of())
    assert list(summary.rows) == ["k-means, pooled readout", "k-means, features"]
    assert list(summary.probes) == ["pooled readout", "mean token"]
    assert all(score.acc == 1.0 for score in summary.probes.values())
    printed = capsys.readouterr().out
    assert "parameters: Mean 0, Classification 20" in printed
    assert "Delta" not in printed


def test_the_comparison_probes_what_the_classifier_may_read(capsys):
    """Labels that only the first token carries: the mean of many others drowns it, the head's histogram too."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place in range(128):
        label = place % 2
        noise = torch.randn(9, 4, generator=generator)
        rows.append({"x": torch.cat([torch.full((1, 4), 2.0 * label - 1), 4 * noise]), "y": torch.tensor(label)})
    summary = FitSummary(compare=True)
    data = DataLoader(rows, batch_size=16)
    run(module(task=Classification(num_classes=2)), summary, train=data, val=data)
    assert summary.probes["first token"].acc == 1.0
    assert summary.probes["mean token"].acc < 0.9
    assert summary.rows["k-means, pooled readout"].keys() == summary.rows["k-means, features"].keys()
    assert "linear probe on" in capsys.readouterr().out


def test_a_comparison_without_labels_is_a_warning(capsys):
    with pytest.warns(UserWarning, match="train_x and train_y must have the same number of rows, at least 1"):
        run(module(task=Clustering()), FitSummary(compare=True), train=rows_of(labelled=False))
    assert "k-means, pooled readout" in capsys.readouterr().out


def test_other_modules_are_left_alone(capsys):
    fit(Project(), FitSummary())
    run(module(), FitSummary(enabled=False))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("far", [1, 3, 4], ids=["one dead code", "all but one dead", "none near"])
def test_a_code_without_tokens_is_not_named_as_the_next_to_split(far):
    tokens, prototypes = torch.randn(1, 400, 3), torch.randn(1, 4, 3)
    prototypes[:, 4 - far :] += torch.arange(far).unsqueeze(-1) * 100 + 1e4
    bank = PrototypeBank(4, 3)
    bank.set_prototypes(prototypes)
    (line,) = summary_module._bank_lines([bank], [tokens])
    if "nearest to a split" in line:
        number, margin = re.search(r"split (\d+) \(margin (\S+)\)", line).groups()
        assert int(number) < 4 - far or far == 4
        assert abs(float(margin)) < 1e3
    assert ("nearest to a split" in line) or far == 4


def test_fit_summary_refuses_fewer_than_one_restart():
    with pytest.raises(ValueError, match="num_restarts must be at least 1"):
        FitSummary(num_restarts=0)
