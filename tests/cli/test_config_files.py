"""Configs and settings in words that cannot be used: one sentence with place, rule, value and remedy."""

import re
import shlex
from pathlib import Path

import pytest

from ddcl_lightning.cli.commands import main
from ddcl_lightning.cli.config_files import check_config, check_words
from ddcl_lightning.recipes import recipe_paths
from tests.cli.test_cli import fails

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'{key}: *{before}' for key in 'pqrstuvwx')}}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    BOMB: "must not repeat more than 10,000 values by aliases; it stands for 490,329,064. Take aliases of aliases out",
    MERGES: "must not repeat more than 10,000 values by aliases; it stands for ",
    "trainer: {1: 2}": "must have text as keys; got '1' in line 1, which is an integer in YAML. Write the name",
    "trainer:\n  null: 2": "must have text as keys; got 'null' in line 2, which is null in YAML. Write",
    "trainer:\n  yes: 2": "must have text as keys; got 'yes' in line 2, which is true or false in YAML. Write",
    "trainer:\n  1.5: 2": "must have text as keys; got '1.5' in line 2, which is a number in YAML. Write",
    "trainer:\n  ? [a, b]\n  : 2": "must have text as keys; got a list in line 2. Write a name there.",
    "? {a: b}\n: 2": "must have text as keys; got a mapping in line 1. Write a name there.",
    "model:\n  head: {class_path: X, init_args: {1: 2}}": "must have text as keys; got '1' in line 2",
    "model: !!python/object/apply:os.system ['x']": "got the tag !!python/object/apply:os.system in line 1. Write text",
    "trainer:\n  max_epochs: !!python/tuple [1]": "must hold plain values; got the tag !!python/tuple in line 2. Write",
    "model: !mine x": "must hold plain values; got the tag !mine in line 1. Write text",
    "trainer: !!set {a, b}": "must hold plain values; got the tag !!set in line 1. Write",
    "trainer:\n  max_epochs: " + "9" * 5000: "must have an integer of at most 9223372036854775807 there; got '9999",
    "trainer:\n  max_epochs: 0x" + "f" * 5000: "must have an integer of at most 9223372036854775807 there; got '0xff",
    "trainer:\n  max_epochs: !!int abc": "must have an integer of at most 9223372036854775807 there; got 'abc'",
    "trainer:\n  max_time: 10:00:00:00": "must not count in sixties; got '10:00:00:00' in line 2, a number in",
    "trainer:\n  <<: 3": "must merge mappings; got another value after << in line 2. Write *NAME of a mapping.",
    "a: &a\n  <<: *a": "must not contain itself (line 1). Take the alias out.",
    "trainer: [1, 2]": "must hold settings by name below 'trainer'; got a list in line 1. Write them as NAME: VALUE.",
    "model: 3": "must hold settings by name below 'model'; got '3' in line 1. Write them as NAME: VALUE.",
    "config: other.yaml": "must not name another config (line 1). Take it out, and pass both with --config.",
    "trainer: *nowhere": "must be YAML; found undefined alias 'nowhere' in line 1. Correct that line.",
    "a: 1\n---\na: 2": "must be YAML; but found another document in line 2. Correct that line.",
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: text[:20])
def test_a_config_that_cannot_be_used_is_one_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(FILES[text])) as refusal:
        check_config(file)
    assert str(refusal.value).startswith(f"--config {file} must ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "trainer:\n  default_root_dir: 2024-13-45",
        "base: &base {max_epochs: 1}\ntrainer:\n  <<: *base\n  logger: false",
        "model:\n  rho: .nan",
        "trainer:\n  callbacks:\n    - class_path: X\n      init_args: {scheduling: {4: 2}}",
        "trainer:\n  max_time: 00:10:00:00",
    ],
)
def test_a_config_that_another_check_judges_passes(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    check_config(tmp_path / "mine.yaml")


def test_every_recipe_passes() -> None:
    for path in recipe_paths().values():
        check_config(path)


WORDS = {
    ("--trainer", "{1: 2}"): "--trainer must have text as keys; got '1'",
    ("--trainer={null: 2}",): "--trainer must have text as keys; got 'null'",
    ("--model.head", "{1: 2}"): "--model.head must have text as keys; got '1'",
    ("--data.init_args={1: 2}",): "--data.init_args must have text as keys; got '1'",
    ("--trainer", "[1, 2]"): "--trainer must hold settings by name",
    ("--trainer", "{max_epochs: 1, max_epochs: 2}"): "--trainer must give every key once; 'max_epochs' is in lines 1",
    ("--trainer.callbacks", "!!python/object:os.x {}"): "--trainer.callbacks must hold plain values; got the tag !!py",
    ("--model.rho", "9" * 5000): "--model.rho must have an integer of at most 9223372036854775807 there; got '9999",
    (
        "--trainer.x",
        "{" + BOMB.strip().replace("\n", ", ") + "}",
    ): "--trainer.x must not repeat more than 10,000",
}


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[0])
def test_words_are_held_to_the_same_rules(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "fit", "--config", "digits", *words).startswith(WORDS[words])


def test_words_of_any_kind_pass() -> None:
    check_words(["fit", "--data.path", "a: b: [", "--x=", "--model.head", "Head", "--trainer.c.s={4: 2}", "--y"])


SLIPS = {
    "": "a command must be given; got none. Pass one of fit, validate, test, predict, explain or recipes.",
    "fti": "unknown command 'fti'. Did you mean 'fit'?",
    "recipe": "unknown command 'recipe'. Did you mean 'recipes'?",
    "validate --config digits --ckpt_path": "--ckpt_path must have a value; got none. Write it after the option.",
    "--config digits fit": "settings must come after the command; got 'model.",
    "recipes foo": "argument command: invalid choice: 'foo' (choose from ",
    "fit --config digits --model.rho=-0.1": "rho = lr_encoder / lr_prototypes must be finite and >= 0; got -0.1.",
    "fit --config digits --model.rho=.nan": "rho must be a finite number; got nan.",
    "fit --config digits --trainer.devices 0 --trainer.accelerator cpu": "`Trainer(devices='0')` value is not a valid "
    "input using cpu accelerator. Correct --trainer.devices.",
    "fit --config digits --model.hed.init_args.K 5": "unknown key 'model.hed.init_args.K'. Did you mean 'model.head'?",
    "fit --config digits --trainer.precision=16-mixed": "precision must not be fp16, which rescales",
    "fit --config digits --trainer.precision=16": "precision must not be fp16, which rescales",
    "fit --config digits --trainer.devices=foo": "`devices` selected with `CPUAccelerator` should be an int > 0. "
    "Correct --trainer.devices.",
    "fit --config digits --trainer.callbacks+=CollapseWarning --trainer.callbacks.every_n_batches=0": "every_n_batches "
    "must be at least 1; got 0.",
    "fit --config digits --trainer.callbacks+=CollapseWarning --trainer.callbacks.rules='{patience: 0}'": "patience "
    "must be at least 1; got 0.",
    "fit --config digits --model.lr_schedule='{shape: linear, warmup_steps: -1}'": "warmup_steps must be >= 0; got -1.",
}


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_is_one_sentence_with_the_way_out(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in error
    (sentence,) = [row for row in error.splitlines() if row.startswith("error: ")]
    assert sentence.removeprefix("error: ").startswith(SLIPS[line])
    assert error.rstrip().endswith(sentence)
