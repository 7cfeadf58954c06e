import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_can_be_run():
    for path in EXAMPLES.glob("*.py"):
        assert 'if __name__ == "__main__":' in path.read_text()


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_attach_to_existing_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = load("attach_to_existing_project")["main"](max_epochs=6)
    check, watch = trainer.callbacks[2:4]
    metrics = trainer.callback_metrics
    assert float(metrics["accuracy"]) > 0.7
    assert bool(trainer.lightning_module.readout.bank.initialized)
    assert (check.checks, check.violations) == (4, 0)
    assert not any(finding.level == "alarm" for finding in watch.findings)
    assert float(metrics["ddcl/temperature_ratio/readout.bank"]) < 0.1
    assert "ddcl/delta_min/readout.bank" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_plain_loop_monitor(capsys):
    pytest.importorskip("vector_quantize_pytorch")
    report = load("plain_loop_monitor")["main"](steps=200).report()
    assert list(report) == ["quantizer.level0", "quantizer.level1"]
    assert all(row.num_tokens > 0 and row.perplexity > 8 for row in report.values())
    assert "quantizer.level1" in capsys.readouterr().out
