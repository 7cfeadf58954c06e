"""The ddcl command, run as a user would."""

import contextlib
import csv
import io
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddcl_lightning import DDCLReadoutModule, PCABackbone, heads
from ddcl_lightning.cli.commands import main, resolve_configs
from ddcl_lightning.recipes import recipe_paths
from tests.recipe_words import LOCAL, SHORT_ROWS, has_prototypes, short_words
from tests.scripts import run_module
from tests.tiny_data import text_file
from tests.tiny_models import tiny_bert

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=2",
]

LABELLED = ["ACC", "NMI", "ARI", "usage", "perplexity"]
UNLABELLED = ["R2", "usage", "perplexity"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


DIGITS = ["--config", "digits", "--model.lr_prototypes=0.02", *QUICK]
HIERARCHY = ["--config", "digits_hierarchical", *QUICK]


def fitted(folder: Path, words: list[str]) -> tuple[Path, str]:
    """The checkpoint of a fit, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["fit", *words, f"--trainer.default_root_dir={folder}"])
    return next(folder.rglob("*.ckpt")), printed.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the digits."""
    return str(fitted(tmp_path_factory.mktemp("digits"), DIGITS)[0])


@pytest.fixture(scope="module")
def hierarchy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The checkpoint and the output of a hierarchy whose levels are trained one by one."""
    words = [*HIERARCHY, "--model.head.init_args.end_to_end=false"]
    return fitted(tmp_path_factory.mktemp("hierarchy"), words)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The first line of the error that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    error: str = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert lines, error
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("name", sorted(recipe_paths()))
def test_every_recipe_fits_and_prints_its_table(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", name, *QUICK, *short_words(name, tmp_path)])
    printed = capsys.readouterr().out
    if not has_prototypes(name):
        return
    assert "k-means, " in printed
    if "tasks.Reconstruction" in recipe_paths()[name].read_text():
        line = next(line for line in printed.splitlines() if line.startswith("reconstruction (val): "))
        ssim = [] if name.startswith("digits") else ["ssim"]  # digits are smaller than its window
        assert re.findall(r"(\w+) -?[\d.]+", line) == ["mse", "psnr", *ssim, "usage", "perplexity", "soft_perplexity"]
    elif "tasks.SemanticIDs" in recipe_paths()[name].read_text():
        line = next(line for line in printed.splitlines() if line.startswith("semantic IDs (val): "))
        counts = rf"relative error [\d.]+, colliding items [\d.]+, distinct [\d,]+ of {SHORT_ROWS}, largest"
        assert re.search(counts, line)
        assert [row.split()[0] for row in printed.splitlines() if re.match(r"\d +\d\.\d{3} ", row)] == ["1", "2", "3"]
    else:
        assert "violations in" in printed
        assert " 0 violations" in printed
    lines = printed.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[-1:] == ["perplexity"])
    columns = lines[header].split()
    assert columns == (UNLABELLED if "label: null" in recipe_paths()[name].read_text() else LABELLED)
    row = lines[header + 1]
    assert row.startswith("prototypes (last step)")
    assert all(float(cell) >= 0 for cell in row.split()[-len(columns) :])


@pytest.mark.parametrize("end_to_end", ["false", "true"])
def test_a_hierarchy_reports_its_levels_and_draws_them(
    end_to_end: str, tmp_path: Path, hierarchy: tuple[Path, str]
) -> None:
    words = [*HIERARCHY, "--model.head.init_args.end_to_end=true"]
    checkpoint, printed = hierarchy if end_to_end == "false" else fitted(tmp_path, words)
    lines = printed.splitlines()
    levels = [line for line in lines if line.startswith("level ")]
    assert [line.split(":")[0] for line in levels] == ["level 1", "level 2"]
    ratios = [float(line.split("T / T_c ")[1].split(",")[0]) for line in levels]
    # Each has a schedule of its own: the second of two epochs is 1 / (0.8 * 2) of the way.
    assert ratios == [pytest.approx(0.1 * ratio**0.625, rel=0.2) for ratio in (0.1, 0.05)]
    accuracy = next(line for line in lines if line.startswith("prototypes (last step)")).split()[-5]
    assert float(accuracy) > 0.6
    tags = EventAccumulator(str(checkpoint.parents[1])).Reload().Tags()
    assert {f"prototypes/head.levels.{level}.bank" for level in (0, 1)} <= set(tags["images"])
    assert {f"ddcl/variance/head.levels.{level}.bank" for level in (0, 1)} <= set(tags["scalars"])


def test_a_hierarchical_checkpoint_predicts_and_goes_on(tmp_path: Path, hierarchy: tuple[Path, str]) -> None:
    words = ["--config", "digits_hierarchical", "--model.head.init_args.end_to_end=false", *QUICK]
    checkpoint = str(hierarchy[0])
    main(["predict", *words, "--ckpt_path", checkpoint])
    table = pd.read_csv("assignments.csv")
    assert len(table) == 1797
    assert table["prototype_1"].max() < 10
    main(["fit", *words[:-1], "--trainer.max_epochs=3", "--ckpt_path", checkpoint])
    assert list(tmp_path.rglob("epoch=2-step=24.ckpt"))


HEADS = sorted(name for name in heads.__all__ if name.endswith("Pooling"))


@pytest.mark.parametrize("head", HEADS)
def test_one_option_swaps_the_head_for_a_baseline(
    head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else of the recipe changes: task, callbacks and summary take any head."""
    words = [f"--model.head={head}", "--summary.compare=true"]
    if head == "VQPooling":
        words.append("--model.head.num_codes=8")
    main(["fit", "--config", "bert_sst2", *QUICK[:-1], "--trainer.max_epochs=1", *LOCAL["bert_sst2"](tmp_path), *words])
    printed = capsys.readouterr().out
    assert "linear probe on" in printed
    assert f"parameters: {head} " in printed


def test_validate_test_and_predict_from_a_checkpoint(digits: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = [*DIGITS, "--ckpt_path", digits]
    main(["validate", *common])
    main(["test", *common])
    assert "test/acc" in capsys.readouterr().out
    main(["predict", *common, "--predictions.path", "found.parquet", "--predictions.top", "2"])
    table = pd.read_parquet("found.parquet")
    assert list(table.columns) == ["index", "prototype_1", "weight_1", "prototype_2", "weight_2"]
    assert table["index"].tolist() == list(range(1797))
    assert (table["weight_1"] >= table["weight_2"]).all()
    main(["predict", *common])
    with open("assignments.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["prototype_1"]) for row in rows] == table["prototype_1"].tolist()


def test_resumes_from_a_checkpoint_of_its_own(digits: str, tmp_path: Path) -> None:
    main(["fit", *DIGITS[:-1], "--trainer.max_epochs=3", "--ckpt_path", digits])
    assert list(tmp_path.rglob("epoch=2-step=24.ckpt"))


def test_settings_that_a_checkpoint_overrules_are_named(digits: str) -> None:
    words = ["validate", *DIGITS, "--ckpt_path", digits]
    main(words)  # the same settings are no warning, which would be an error here
    Path("more.yaml").write_text("model: {head: {class_path: DDCLReadout, init_args: {num_prototypes: 12}}}\n")
    with pytest.warns(UserWarning, match=r"model\.head\.init_args\.num_prototypes = 10 \(not 12\)") as caught:
        main([*words, "--config", "more.yaml"])
    assert len([warning for warning in caught if "ckpt_path was trained" in str(warning.message)]) == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "explain"])
@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--config", "digits", "--model.head.num_prototypes=12"], "model.head.num_prototypes = 10 (got 12)"),
        (["--config", "digits", "--model.lr_prototypes=0.5"], "model.lr_prototypes = 0.02 (got 0.5)"),
        (["--config", "digits_vqvae"], "model.backbone = PCABackbone (got "),
        (["--config", "digits", "--model.task", "Classification"], "model.task = Clustering (got Classification)"),
    ],
)
def test_a_checkpoint_of_another_model_than_was_asked_for_is_refused(
    command: str, words: list[str], difference: str, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, command, *words, *QUICK, "--ckpt_path", digits)
    assert line.startswith(f"ckpt_path must be of the model that the config and the options give; {digits!r} was ")
    assert difference in line
    assert not list(Path().rglob("*.ckpt"))


def test_checkpoints_of_the_command_line_load_by_themselves(digits: str) -> None:
    module = DDCLReadoutModule.load_from_checkpoint(digits, weights_only=True)
    assert module.lr_prototypes == 0.02
    assert isinstance(module.backbone, PCABackbone)
    assert bool(module.backbone.fitted)


def test_print_config_shows_what_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "digits", "--model.rho=0.3", "--print_config"])
    assert stop.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["rho"] == 0.3
    assert config["model"]["prototype_optimizer"] == "Adam"
    assert config["model"]["head"]["init_args"]["embedding_scale"] == "auto"
    assert config["summary"] == {"enabled": True, "num_restarts": 10, "compare": False}
    assert config["predictions"] == {
        "path": "assignments.csv",
        "top": 3,
        "columns": None,
        "dropped": False,
        "codebooks": None,
    }
    assert "optimizer" not in config


def test_short_class_names_work(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.backbone=IdentityBackbone", "--model.backbone.in_features=64", "--data=DigitsDataModule"]
    words += ["--model.head=DDCLReadout", "--model.head.num_prototypes=5", "--model.task=Clustering"]
    main(["fit", *words, *QUICK])
    assert "prototypes (last step)" in capsys.readouterr().out


def test_classification_reports_its_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--model.task=Classification", "--model.task.num_classes=10", "--data.val_fraction=0.2"]
    main(["fit", "--config", "digits", *task, *QUICK[:-1], "--trainer.max_epochs=5"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("classifier val/acc"))
    assert float(line.split()[-1]) > 0.6


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe_paths())
    assert all(len(line.split()) > 5 for line in lines)


def test_recipe_is_copied_and_runs_from_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "copy", "digits"])
    assert capsys.readouterr().out.strip() == "digits.yaml"
    assert (tmp_path / "digits.yaml").read_text() == recipe_paths()["digits"].read_text()
    main(["fit", "--config", "digits.yaml", *QUICK])
    assert "digits.yaml exists already" in fails(capsys, "recipes", "copy", "digits")


def test_config_takes_names_and_paths(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {}\n")
    shipped = str(recipe_paths()["digits"])
    assert resolve_configs(["fit", "--config", "digits"]) == ["fit", "--config", shipped]
    assert resolve_configs(["fit", "--config=digits.yaml"]) == ["fit", f"--config={shipped}"]
    assert resolve_configs(["fit", "-c", "mine.yaml", "--model.rho", "digits"]) == [
        *["fit", "-c", "mine.yaml", "--model.rho", "digits"]
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.lr_prototype", "3"], "unknown key 'model.lr_prototype'. Did you mean 'model.lr_prototypes'?"),
        (["--trainer.max_epoch=3"], "unknown key 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?"),
        (
            ["--model.head.init_args.num_prototype", "3"],
            "unknown argument 'num_prototype' of ddcl_lightning.heads.DDCLReadout. Did you mean 'num_prototypes'?",
        ),
        (
            ["--data.batch_siz=3"],
            "unknown argument 'batch_siz' of ddcl_lightning.datamodules.DigitsDataModule. Did you mean 'batch_size'?",
        ),
        (["--model.head=DDCLReadot"], "unknown class 'DDCLReadot' for model.head. Did you mean 'DDCLReadout'?"),
        (["--model.rho", "much"], "model.rho must be a number; got much."),
        (["--model.rho", "1.5"], "rho = lr_encoder / lr_prototypes must be < 1"),
        (["--model.prototype_optimizer", "Adem"], "prototype_optimizer must name a class of torch.optim"),
        (["--model.encoder_optimizer", "{args: {lr: 0.1}}"], "encoder_optimizer.args must not contain lr (got 0.1)"),
        (["--data.batch_size", "0"], "batch_size must be an integer of at least 1; got 0."),
        (["--predictions.path", "table.xlsx"], "path must end in .csv or .parquet; got 'table.xlsx'"),
    ],
)
def test_wrong_words_are_named_in_the_first_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, "fit", "--config", "digits", *words).startswith(message)


def test_unknown_keys_in_a_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipe_paths()["digits"].read_text()
    (tmp_path / "a.yaml").write_text(text.replace("lr_prototypes:", "lr_protoypes:"))
    assert fails(capsys, "fit", "--config", "a.yaml").endswith("Did you mean 'model.lr_prototypes'?")
    (tmp_path / "b.yaml").write_text(text.replace("start: 0.1", "begin: 0.1"))
    first = fails(capsys, "fit", "--config", "b.yaml")
    assert first.startswith("unknown argument 'begin' of ddcl_lightning.callbacks.TemperatureAnnealing")


def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "fit", "--config", "digts").endswith("Did you mean 'digits'?")
    assert "is neither a file nor a shipped recipe" in fails(capsys, "recipes", "copy", "nothing_like_it")


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    finished = run_module("ddcl_lightning", ["recipes"], tmp_path)
    assert finished.code == 0, finished.stderr
    assert finished.stdout.splitlines()[0].split()[0] in recipe_paths()


def test_the_installed_command_is_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = entry_points(group="console_scripts", name="ddcl")
    monkeypatch.setattr(sys, "argv", ["ddcl", "recipes"])
    command.load()()
    assert capsys.readouterr().out.splitlines()[0].split()[0] in recipe_paths()


def test_texts_become_ids_as_the_guide_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    guide = (Path(__file__).parents[2] / "docs" / "semantic-ids.md").read_text(encoding="utf-8")
    shown = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)[0]
    for old, new in {
        "384": "32",
        "num_codes: 256": "num_codes: 8",
        "title": "text",
        "items.csv": "items.jsonl",
    }.items():
        shown = shown.replace(old, new)
    (tmp_path / "texts.yaml").write_text(shown, encoding="utf-8")
    tiny_bert(tmp_path / "my-encoder")
    text_file(tmp_path / "items.jsonl")
    main(["fit", "--config", "texts.yaml", *QUICK])
    assert re.search(r"^semantic IDs \(val\): relative error [\d.]+, colliding items", capsys.readouterr().out, re.M)
    checkpoint = str(next(tmp_path.rglob("*.ckpt")))
    words = ["--ckpt_path", checkpoint, "--predictions.path", "ids.csv", "--predictions.columns", "[text]"]
    main(["predict", "--config", "texts.yaml", *QUICK, *words])
    table = pd.read_csv("ids.csv")
    assert list(table) == ["index", "code_1", "code_2", "code_3", "disambiguation", "mse", "text"]
    assert len(table) == 144
    # Equal texts have one ID, and numbers that tell them apart.
    by_text = table.groupby("text")[["code_1", "code_2", "code_3"]].nunique()
    assert (by_text == 1).all(axis=None)
    assert not table.duplicated(["code_1", "code_2", "code_3", "disambiguation"]).any()


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "`ddcl recipes` lists the shipped recipes" in printed
    assert "explain" in printed
