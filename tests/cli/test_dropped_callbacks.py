"""A later config that replaces the callbacks of an earlier one says so."""

import warnings
from pathlib import Path

import pytest

from ddcl_lightning.cli.commands import main
from ddcl_lightning.cli.dropped_callbacks import dropped_callbacks

FIRST = "trainer: {callbacks: [{class_path: a.KMeans}, {class_path: a.Check}, {class_path: a.Check}]}"


@pytest.mark.parametrize(
    ("configs", "final", "dropped"),
    [
        ([FIRST], ["a.KMeans", "a.Check", "a.Check"], []),
        ([FIRST, "trainer: {callbacks: [{class_path: b.Stop}]}"], ["b.Stop"], ["Check", "Check", "KMeans"]),
        ([FIRST, "trainer: {callbacks: {class_path: b.Check}}"], ["b.Check"], ["Check", "KMeans"]),
        ([FIRST, "trainer: {callbacks: null}"], [], ["Check", "Check", "KMeans"]),
        ([FIRST, "trainer: {callbacks+: [{class_path: b.Stop}]}"], ["a.KMeans", "a.Check", "a.Check", "b.Stop"], []),
        (["trainer: {max_epochs: 1}", "model: {}", "", "trainer:"], ["b.Stop"], []),
    ],
)
def test_what_an_earlier_config_asked_for_is_named(configs: list[str], final: list[str], dropped: list[str]) -> None:
    assert dropped_callbacks(configs, [{"class_path": path} for path in final]) == dropped


@pytest.mark.parametrize("key", ["callbacks", "callbacks+"])
def test_the_command_line_warns_of_dropped_callbacks(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"trainer:\n  {key}:\n    - class_path: lightning.pytorch.callbacks.Timer\n")
    words = ["fit", "--config", "digits", "--config", "mine.yaml", "--trainer.fast_dev_run", "true"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main([*words, "--summary.enabled", "false"])
    messages = [str(warning.message) for warning in caught if "earlier config" in str(warning.message)]
    if key == "callbacks":
        assert len(messages) == 1
        assert "CollapseWarning, DecompositionCheck, KMeansInitialization" in messages[0]
        assert "callbacks+:" in messages[0]
    else:
        assert messages == []
