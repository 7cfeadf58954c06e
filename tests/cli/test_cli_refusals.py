"""Checkpoints that are none, and settings that two manual optimizers cannot follow: one line each, with the way out."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddcl_lightning.cli.commands import main
from tests.cli.test_cli import fails

COMMANDS = ("fit", "validate", "test", "predict", "explain")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
FIT = ["fit", "--config", "digits", *QUIET, *SHORT]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _emptied(optimizers: list[Any]) -> list[Any]:
    return [{**optimizers[0], "state": {}}, *optimizers[1:]]


def _step(loops: dict[str, Any]) -> dict[str, Any]:
    loops["fit_loop"]["epoch_progress"]["total"]["ready"] = "x"
    return loops


def _temperature(state: dict[str, Any]) -> dict[str, Any]:
    return {name: -value if name.endswith("temperature_state.current") else value for name, value in state.items()}


# Files that hold something else than a run leaves, by what is changed in a good one.
TAMPERED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "loops.ckpt": {"loops": lambda loops: {}},
    "progress.ckpt": {"loops": _step},
    "step.ckpt": {"global_step": lambda step: "x"},
    "epoch.ckpt": {"epoch": lambda epoch: -5},
    "moments.ckpt": {"optimizer_states": _emptied},
    "optimizer.ckpt": {"optimizer_states": lambda states: [{"state": {}}]},
    "temperature.ckpt": {"state_dict": _temperature},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good one, and what may be taken for one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    main([*FIT, f"--trainer.default_root_dir={folder}", "--summary.enabled=false"])
    whole = next(folder.rglob("*.ckpt"))
    good = torch.load(whole, weights_only=True)
    (folder / "torn.ckpt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, folder / "foreign.ckpt")
    torch.save(torch.nn.Linear(2, 2), folder / "pickled.ckpt")
    torch.save({**good, "state_dict": {"weight": torch.zeros(2)}}, folder / "other.ckpt")
    torch.save({**good, "ddcl_class_names": ["cat", "dog"]}, folder / "animals.ckpt")
    torch.save({name: value for name, value in good.items() if name != "optimizer_states"}, folder / "weights.ckpt")
    torch.save({**good, "optimizer_states": []}, folder / "reset.ckpt")
    lacking = {name: value for name, value in good.items() if name not in ("hyper_parameters", "callbacks")}
    torch.save(lacking, folder / "lacking.ckpt")
    flipped = bytearray(whole.read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (folder / "flipped.ckpt").write_bytes(flipped)
    for name, entries in TAMPERED.items():
        torch.save(
            {**good, **{key: change(copy.deepcopy(good[key])) for key, change in entries.items()}}, folder / name
        )
    return folder


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "explain"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere", "there is none at"),
        ("torn", "cannot be read as one: it is torn"),
        ("empty", "cannot be read as one"),
        ("foreign", "holds no 'pytorch-lightning_version'"),
        ("pickled", "holds Python objects, which run code when they are loaded"),
        ("other", "of another one"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    command: str, name: str, expected: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUIET, "--config", "digits", "--ckpt_path", str(checkpoints / f"{name}.ckpt")]
    line = fails(capsys, command, *words)
    assert expected in line
    if name != "other":
        assert f"{name}.ckpt" in line
        beside = line.partition("Beside it lies '")[2].partition("'")[0]
        assert Path(beside).stem not in ("", "torn", "empty", "foreign", "pickled")


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [
        *((command, "flipped", "the checksum of its entry '.*' is another one") for command in COMMANDS),
        *((command, "step", "global_step must be an integer of at least 0; got 'x'") for command in COMMANDS),
        *((command, "epoch", "epoch must be an integer of at least 0; got -5") for command in COMMANDS),
        *((command, "temperature", "temperature_state.current must be finite and > 0; got -") for command in COMMANDS),
        ("fit", "loops", "'fit_loop' in its 'loops' must be progress as a run leaves it; got None"),
        ("validate", "loops", r"a run cannot go on from it \(KeyError: 'validate_loop'\)"),
        ("fit", "progress", "'ready' in its 'loops' must be progress as a run leaves it; got 'x'"),
        ("fit", "moments", r"its optimizers must hold \[\d+(, \d+)?\] tensors, as were written; got \[0"),
        ("fit", "optimizer", r"its optimizers must hold"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_with_one_way_out(
    command: str, name: str, expected: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUIET, "--config", "digits", "--ckpt_path", str(checkpoints / f"{name}.ckpt")]
    line = fails(capsys, command, *words)
    beside = line.partition("Beside it lies '")[2].partition("'")[0]
    broken = {Path(file).stem for file in TAMPERED} - {"temperature"} if command == "fit" else {"step", "epoch"}
    assert Path(beside).stem not in {"flipped", *broken}
    rule = "ckpt_path must be an undamaged checkpoint; "
    assert re.match(rf"{rule}'\S+{name}\.ckpt' is damaged: .*{expected}.*\. Take another\.", line), line
    assert "Use the config" not in line
    assert "load another" not in line


def test_weights_alone_are_refused_where_training_is_to_go_on(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("weights", "reset"):
        assert "'optimizer_states'" in fails(capsys, *FIT, "--ckpt_path", str(checkpoints / f"{name}.ckpt"))


def test_what_a_resumed_run_begins_anew_is_one_warning(checkpoints: Path) -> None:
    with pytest.warns(UserWarning) as caught:  # noqa: PT030 - the texts are compared below
        main([*FIT, "--ckpt_path", str(checkpoints / "lacking.ckpt"), "--summary.enabled=false"])
    (text,) = (str(each.message) for each in caught if "lacking.ckpt" in str(each.message))
    assert "holds no 'hyper_parameters': the model is built as the config says" in text
    assert "holds no 'callbacks': the order of the data, best checkpoints" in text


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "explain"])
def test_a_checkpoint_of_other_classes_is_refused(
    command: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, command, *FIT[1:5], "--ckpt_path", str(checkpoints / "animals.ckpt"))
    assert "was trained on, 2: 'cat', 'dog'; got 10: '0', '1'" in line


@pytest.mark.parametrize("value", ["4294967296", "-1"])
def test_a_seed_that_no_generator_takes_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *FIT, f"--seed_everything={value}")
    assert line.startswith(f"seed_everything must be in [0, 4294967295]; got {value}")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("gradient_clip_val=1.0", "use --model.gradient_clip_val."),
        ("accumulate_grad_batches=2", "use --model.accumulate_grad_batches."),
        ("accelerator=tpu", "use --trainer.accelerator auto, or cpu."),
        ("limit_train_batches=2.5", "invalid value 2.5 for limit_train_batches"),
        ("val_check_interval=1000", "must be less than or equal to the number of the training batches"),
        ("strategy=deepspeed", "DeepSpeed"),
    ],
)
def test_settings_of_the_trainer_that_cannot_work_are_refused_with_the_remedy(
    setting: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in fails(capsys, *FIT, f"--trainer.{setting}")


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["TemperatureAnnealing"], ", or give the other a pattern of its own as banks."),
        (["ModelCheckpoint"], ", or give the other another monitor or interval."),
        (["CollapseWarning"], "."),
    ],
)
def test_two_callbacks_of_one_state_are_one_sentence(
    words: list[str], way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, *FIT, *(f"--trainer.callbacks+={word}" for word in words))
    assert line == (
        f"trainer.callbacks must not hold two of {words[0]} whose states are one in a checkpoint; got another beside "
        f"that of the config. Change that one in a config of your own (`ddcl recipes copy`){way_out}"
    )


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_last_checkpoint_of_no_run_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [command, *FIT[1:], "--ckpt_path", "last"]
    assert "must find a checkpoint of an earlier run" in fails(capsys, *words)


def test_a_path_of_the_data_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "digits", "--data", "TextDataModule", "--data.init_args.path", "null"]
    line = fails(capsys, *words)
    assert line.startswith("data.init_args.path must be given: ddcl_lightning.TextDataModule has no default")


@pytest.mark.parametrize("command", ["validate", "test", "predict", "explain"])
@pytest.mark.parametrize("recipe", ["digits_hierarchical", "vit_digits"])
def test_random_weights_are_not_evaluated(command: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, command, "--config", recipe).startswith("ckpt_path is needed: without a checkpoint the ")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write to, whoever they are")
@pytest.mark.parametrize("folder", ["/proc/runs", "/proc/runs/of/today"])
@pytest.mark.parametrize("logger", [True, False])
def test_a_folder_for_runs_that_cannot_be_made_is_one_sentence(
    folder: str, logger: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in FIT if not logger or word != "--trainer.logger=false"]
    line = fails(capsys, *words, f"--trainer.default_root_dir={folder}")
    if logger:
        rule = r"/proc/runs\S* must be in a folder that may be written to; it cannot be made \(No such file"
        assert line.endswith("Choose another place (--trainer.default_root_dir for runs).")
    else:
        rule = r"trainer.default_root_dir must be a folder that may be written to; ./proc/runs.* is none"
    assert re.match(rule, line)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_whoever_reads_it(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "dog" / "2.png").write_bytes(b"no picture")
    words = ["--config", "cnn_fashion_mnist", "--data", "ImageFolderDataModule", "--data.path=images"]
    words += ["--data.image_size=16", "--data.batch_size=4", f"--data.num_workers={workers}"]
    words += ["--model.backbone.init_args.in_channels=3", "--model.task.init_args.num_classes=2", *QUIET, *SHORT]
    line = fails(capsys, "fit", *words)
    assert line.startswith("images must be readable; ")
    assert "dog" in line
