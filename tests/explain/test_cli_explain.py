"""``ddcl explain`` as a user would run it, and which errors of a run end in a sentence."""

import os
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

from ddcl_lightning import Clustering, DDCLReadoutModule, PCABackbone
from ddcl_lightning.checkpoints.reading import read_checkpoint
from ddcl_lightning.cli.commands import main
from ddcl_lightning.cli.errors import is_refusal, sentence
from ddcl_lightning.datamodules import DigitsDataModule
from ddcl_lightning.explain import collect
from tests.processes import run_processes

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDCL_TRACEBACK", raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    main(["fit", "--config", "digits", *QUICK, "--trainer.max_epochs=1", "--summary.enabled=false"])
    return str(next(tmp_path.rglob("*.ckpt")))


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The whole standard error of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    error: str = capsys.readouterr().err
    assert "Traceback" not in error
    return next(line for line in error.splitlines() if line.startswith("error: ")).removeprefix("error: ")


def test_report_of_a_checkpoint_is_written_twice_the_same(checkpoint: str, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    common = ["explain", "--config", "digits", *QUICK, "--ckpt_path", checkpoint, "--inputs", "4", "--examples", "3"]
    main([*common, "--output", "one.html"])
    main([*common, "--output", "two.html"])
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "two.html").read_text(encoding="utf-8")
    # Nothing else: no log folder, no table of predictions, no copy of the config.
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.name for path in left} == {"one.html", "two.html"}
    assert page.count("<img") == 10 * 2 + 10 * 3 + 4
    assert Path(checkpoint).name in page
    assert "1,797 training samples" in page
    state = read_checkpoint(checkpoint)["callbacks"]["CollapseWarning"]
    assert state["verdict"].startswith("head.attention.bank: perplexity ")
    assert f"Health in training of {escape(state['verdict'])}" in page
    # It is the model of the checkpoint that is told about.
    module = DDCLReadoutModule.load_from_checkpoint(checkpoint, weights_only=True)
    metrics = collect(module, DigitsDataModule(seed=42), inputs=0).heads[0].metrics
    assert f"<dd>{metrics['acc']:.3f}<small>" in page
    assert f"<dd>{metrics['nmi']:.3f}<small>" in page


def test_report_of_semantic_ids_is_their_tree(tmp_path: Path) -> None:
    common = ["--config", "semantic_ids", *QUICK]
    main(["fit", *common, "--trainer.max_epochs=1", "--summary.enabled=false"])
    main(["explain", *common, "--ckpt_path", str(next(tmp_path.rglob("*.ckpt"))), "--inputs", "4", "--examples", "3"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert " IDs of 1,797 items</h1>" in page
    assert page.count("<h3>Item #") == 4
    assert "<td>3</td>" in page
    assert "Health in training of head.quantizer.levels.0" in page


def test_options_of_the_report(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["explain", "--config", "digits", *QUICK, "--ckpt_path", checkpoint]
    main([*common, "--indices", "[17, 3]", "--max_samples", "100"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("Input #17") < page.index("Input #3<")
    assert "256 training samples (a part of them)" in page
    assert fails(capsys, *common, "--examples", "0").startswith("examples must be at least 1; got 0")
    assert "[5000] are not among the 1797 samples" in fails(capsys, *common, "--indices", "[5000]")


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--output", "--examples", "--inputs", "--indices", "--max_samples", "--ckpt_path"):
        assert option in text


def test_refusals_come_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["explain", "--config", "digits", *QUICK]
    assert fails(capsys, *common).startswith("ckpt_path is needed: without a checkpoint the prototypes are random.")
    message = fails(capsys, *common, "--ckpt_path", "nowhere.ckpt")
    assert message.startswith("ckpt_path must be a checkpoint file; there is none at 'nowhere.ckpt'.")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert "'text.ckpt' cannot be read as one" in fails(capsys, *common, "--ckpt_path", "text.ckpt")
    torch.save({"weights": 1}, "other.ckpt")
    assert "'other.ckpt' holds no 'state_dict', or not" in fails(capsys, *common, "--ckpt_path", "other.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.4"}, "empty.ckpt")
    given = [*common, "--ckpt_path", "empty.ckpt", "--output"]
    assert "there is no 'reports'. Create it first." in fails(capsys, *given, "reports/a.html")
    assert "output must end in .html; got 'a.pdf'" in fails(capsys, *given, "a.pdf")
    (tmp_path / "folder.html").mkdir()
    assert "output must be a file; 'folder.html' is a folder." in fails(capsys, *given, "folder.html")
    assert "unknown key 'example'. Did you mean 'examples'?" in fails(capsys, *given, "a.html", "--example=3")


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.4"}, "empty.ckpt")
    (tmp_path / "closed").mkdir()
    # Whoever runs the tests as root may write anywhere, so the system's answer is played.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and allowed(path, mode))
    words = ["explain", "--config", "digits", *QUICK, "--ckpt_path", "empty.ckpt", "--output", "closed/a.html"]
    assert fails(capsys, *words).startswith("output must lie where you may write; 'closed/a.html' does not.")


def test_a_head_without_prototypes_has_nothing_to_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model.head=MeanPooling", "--model.task=Classification", "--model.task.init_args.num_classes=10"]
    callbacks = ["--trainer.callbacks=null", "--summary.enabled=false"]
    main(["fit", "--config", "digits", *QUICK, *callbacks, *model, "--trainer.max_epochs=1"])
    given = ["--ckpt_path", str(next(tmp_path.rglob("*.ckpt")))]
    message = fails(capsys, "explain", "--config", "digits", *QUICK, *callbacks, *model, *given)
    assert message.startswith("there is nothing to explain: the head MeanPooling has no prototypes.")


def test_a_checkpoint_of_another_model_is_refused(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["explain", "--config", "digits", *QUICK, "--ckpt_path"]
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"] = {name: value for name, value in state["state_dict"].items() if "prototypes" not in name}
    torch.save(state, "partial.ckpt")
    message = fails(capsys, *common, "partial.ckpt")
    assert message == (
        "ckpt_path must be a checkpoint of this model; 'partial.ckpt' is of another one (Missing key(s) in state_dict: "
        '"head.attention.bank.prototypes"). Use the config that it was trained with.'
    )


def test_errors_of_checks_in_a_run_are_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--config", "debris", *QUICK, "--data.init_args.catalogue=nowhere.csv"]
    assert "nowhere.csv" in fails(capsys, *words)
    monkeypatch.setenv("DDCL_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError), match=r"nowhere\.csv"):
        main(words)


class BrokenTask(Clustering):
    """A plug-in with a bug of its own."""

    def losses(self, readout: Any, batch: Any) -> Any:
        first, second = [1, 2, 3]
        return {"loss": first + second}


class MisusingBackbone(PCABackbone):
    """A plug-in that hands this package nonsense."""

    def forward(self, batch: Any) -> Any:
        self.fit(batch["x"][:2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.task=tests.explain.test_cli_explain.BrokenTask"], "too many values to unpack"),
        (["--model.backbone.class_path=tests.explain.test_cli_explain.MisusingBackbone"], "must hold at least"),
    ],
)
def test_errors_below_code_of_the_user_keep_their_traceback(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", "digits", *QUICK, "--trainer.max_epochs=1", *words])


def caught(source: str, module: str) -> BaseException:
    """The error of code that seems to come from a module, called by this package."""
    scope: dict[str, Any] = {"__name__": module}
    exec(compile(f"def run():\n    {source}", f"{module}.py", "exec"), scope)
    caller: dict[str, Any] = {"__name__": "ddcl_lightning.module", "run": scope["run"]}
    exec(compile("def call():\n    run()", "caller.py", "exec"), caller)
    try:
        caller["call"]()
    except BaseException as error:
        trace = error.__traceback__
        return error.with_traceback(trace and trace.tb_next)  # without the frame of this test
    raise AssertionError


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("raise ValueError('x must be y')", "ddcl_lightning.datamodules.text", True),
        ("raise RuntimeError('not fitted')", "ddcl_lightning.backbones.pca", True),
        ("raise FloatingPointError('not finite')", "ddcl_lightning.module", True),
        ("open('nowhere.csv')", "ddcl_lightning.datamodules.text", True),
        ("import gzip; gzip.open('nowhere.gz')", "ddcl_lightning.datamodules.text", True),
        ("import no_such_package_here", "ddcl_lightning.backbones.timm", True),
        ("int('x')", "ddcl_lightning.datamodules.text", False),  # a bug of ours
        ("import json; json.loads('{')", "ddcl_lightning.datamodules.text", False),
        ("raise KeyError('a')", "ddcl_lightning.module", False),
        ("assert False", "ddcl_lightning.module", False),
        ("raise ValueError('mine')", "my_plugin.data", False),
        ("open('nowhere.csv')", "my_plugin.data", False),
        ("raise ValueError('torch')", "torch.nn", False),
    ],
)
def test_what_is_a_refusal(source: str, module: str, expected: bool) -> None:
    assert is_refusal(caught(source, module)) is expected


def test_sentences_have_no_error_numbers() -> None:
    assert sentence(caught("open('nowhere.csv')", "ddcl_lightning.x")) == "No such file or directory: nowhere.csv"
    assert sentence(OSError("no model of that name")) == "no model of that name"
    assert sentence(ValueError()) == "ValueError"


@pytest.mark.slow
def test_a_refusal_ends_the_process_with_two(tmp_path: Path) -> None:
    words = ["fit", "--config", "debris", *QUICK, "--data.init_args.catalogue=nowhere.csv"]
    (finished,) = run_processes(tmp_path, main, words, processes=1)
    assert finished.code == 2
    assert "Traceback" not in finished.output
    assert "error: " in finished.output
    assert "DDCL_TRACEBACK=1" in finished.output
