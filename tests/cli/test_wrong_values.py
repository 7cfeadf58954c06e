"""Values and files that cannot be used: the first line names the key, what it must be, and what it got."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddcl_lightning.cli.commands import main
from ddcl_lightning.cli.config_files import check_config
from ddcl_lightning.cli.wrong_values import missing_value, wrong_value
from ddcl_lightning.datamodules import CIFAR10DataModule, DebrisDataModule, MNISTDataModule, TextDataModule
from ddcl_lightning.recipes import recipe_paths
from tests.tiny_data import idx_folder, jpeg_file


def signals(name: str) -> str:
    """A list of signals with a class of this name."""
    signal = f"{{class_path: tests.cli.broken.{name}}}"
    return f"--trainer.callbacks=[{{class_path: CollapseWarning, init_args: {{additional: [{signal}]}}}}]"


def added(name: str, word: str) -> str:
    """A callback that is added to those of the recipe, with a word about it."""
    return f"--trainer.callbacks+={name} --trainer.callbacks.{word}"


ANNEALING = "{class_path: ddcl_lightning.callbacks.TemperatureAnnealing, init_args: {start: abc}}"
WORDS = {
    "--trainer.max_epochs=ten": "trainer.max_epochs must be an integer or null; got ten.",
    "--trainer.max_epochs=2.5": "trainer.max_epochs must be an integer or null; got 2.5.",
    "--trainer.max_epochs=[1]": "trainer.max_epochs must be an integer or null; got [1].",
    "--trainer.max_epochs=": "trainer.max_epochs must be an integer or null; got nothing.",
    "--model.rho=much": "model.rho must be a number; got much.",
    "--model.accumulate_grad_batches=2.5": "model.accumulate_grad_batches must be an integer; got 2.5.",
    "--model.allow_unstable=maybe": "model.allow_unstable must be true or false; got maybe.",
    "--model.gradient_clip_val=x": "model.gradient_clip_val must be a number or null; got x.",
    "--model.lr_schedule=fast": "model.lr_schedule must be one of 'constant', 'linear', 'cosine' or a mapping of shape "
    "and warmup_steps; got fast.",
    "--model.prototype_optimizer.args=3": "model.prototype_optimizer.init_args.args must be a mapping; got 3",
    "--model.head=[1]": "model.head must be the name of a Head; got [1].",
    "--model.head.num_prototypes=2.5": "model.head.init_args.num_prototypes must be an integer; got 2.5",
    "--model.task.num_classes=x": "model.task.init_args.num_classes must be an integer or null; got x",
    "--data.batch_size=x": "data.init_args.batch_size must be an integer; got x",
    "--predictions.columns=3": "predictions.columns must be a list or null; got 3.",
    "--seed_everything=abc": "seed_everything must be true or false or an integer; got abc.",
    f"--trainer.callbacks=[{ANNEALING}]": "trainer.callbacks.init_args.start must be a number or a list or a "
    "mapping of value and unit; got abc",
    "--model.head.temperature=warm": "model.head.init_args.temperature must be a number or a list or a mapping of "
    "value and unit; got warm",
    "--model.head=tests.cli.broken.Headless": "model.head must name a class with all of its methods; "
    "tests.cli.broken.Headless is abstract: write forward.",
    "--model.task=tests.cli.broken.Taskless": "model.task must name a class with all of its methods; "
    "tests.cli.broken.Taskless is abstract: write losses.",
    signals("Unread"): "trainer.callbacks.init_args.additional must name a class with all of its methods; "
    "tests.cli.broken.Unread is abstract: write read.",
    signals("Other"): "trainer.callbacks.init_args.additional must be the name of a Signal or null; got "
    "tests.cli.broken.Other",
    signals("Unraed"): "trainer.callbacks.init_args.additional must name a class; tests.cli.broken has no 'Unraed'. "
    "Did you mean 'Unread'?",
    **{
        f"--trainer.callbacks+={name}": f"trainer.callbacks must be the name of a Callback or null; got {name}. Name a "
        "subclass of Callback."
        for name in ("torch.nn.Linear", "ddcl_lightning.Clustering", "math.sqrt")
    },
    "--trainer.logger=torch.nn.Linear": "trainer.logger must be the name of a Logger or an Iterable or true or false "
    "or null; got torch.nn.Linear. Name a subclass of Logger.",
    "--model.head=Head": "model.head must name a class of its own; got Head, or arguments alone.",
    "--model.head=tests.cli.broken.Haedless": "model.head must name a class; tests.cli.broken has no 'Haedless'. Did "
    "you mean 'Headless'?",
    "--model.head=nowhere.Head": "model.head must name a class; there is no module 'nowhere'.",
    "--data=tests.cli.broken.Rowless": "data must name a class with all of its methods; tests.cli.broken.Rowless is "
    "abstract: write tensors.",
    "--model.head=tests.cli.broken.Uninitialized": "Uninitialized.__init__() must call super().__init__() before it "
    "keeps a layer; got a layer first. Make it the first line of Uninitialized.__init__().",
    "--data=tests.cli.broken.UninitializedRows": "UninitializedRows.__init__ must call super()",
    "--model.task={class_path: Reconstruction, init_args: {decoder: ConvDecodr}}": "unknown class 'ConvDecodr' for "
    "model.task.init_args.decoder. Did you mean 'ConvDecoder'?",
}


def test_an_unknown_short_name_says_how_to_name_a_class_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    line = first_line(capsys, "--config", "digits", "--model.head=Unpooled")
    assert line.startswith("unknown class 'Unpooled' for model.head. ")
    assert line.endswith(" One of your own is named with its module: MODULE.Unpooled.")


def test_a_plug_in_beside_the_config_is_found_by_the_way_that_the_refusal_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the working directory is imported unasked."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", "digits", "--model.head=slips.Mine"]
    rule = "model.head must name a class; there is no module 'slips'."
    assert first_line(capsys, *words) == (
        f"{rule} Install slips, or run `python -m ddcl_lightning` from the folder that holds slips.py."
    )
    source = "from ddcl_lightning import MeanPooling\n\nclass Mine(MeanPooling):\n    pass\n"
    (tmp_path / "slips.py").write_text(source, encoding="utf-8")
    assert first_line(capsys, *words) == (
        f"{rule} slips lies in this folder: run `python -m ddcl_lightning` instead of `ddcl`, or set PYTHONPATH=."
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # as both do
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    assert "class_path: slips.Mine" in capsys.readouterr().out
    rule = "model.head must name a class; there is no module 'slops'."
    assert first_line(capsys, *words[:2], "--model.head=slops.Mine") == f"{rule} Correct the name, or install slops."


ADDED = {
    added(
        "ModelCheckpoint", "save_top_k=abc"
    ): "trainer.callbacks.init_args.save_top_k must be an integer; got abc (an "
    "argument of lightning.pytorch.callbacks.ModelCheckpoint)",
    f"--trainer.callbacks+=ModelCheckpoint {added('ModelCheckpoint', 'every_n_epochs=x')}": "trainer.callbacks."
    "init_args.every_n_epochs must be an integer or null; got x",
    added(
        "CollapseWarning", "every_n_batches=x"
    ): "trainer.callbacks.init_args.every_n_batches must be an integer; got x",
    added("CollapseWarning", "on_collapse=explode"): "trainer.callbacks.init_args.on_collapse must be one of 'warn', "
    "'stop', 'raise'; got explode (an argument of ddcl_lightning.CollapseWarning)",
    added("CollapseWarning", "rules={max_drop:x}"): "trainer.callbacks.init_args.rules",
    added("CollapseWarning", "rules.max_drop=x"): "trainer.callbacks.init_args.rules",
    added("CollapseWarning", "save_top_k=1"): "unknown argument 'save_top_k' of ddcl_lightning.CollapseWarning",
    added(
        "CollapseWarning", "every_n_batchs=3"
    ): "unknown argument 'every_n_batchs' of ddcl_lightning.CollapseWarning. Did you mean 'every_n_batches'?",
    "--trainer.callbacks=null --trainer.callbacks.every_n_batches=3": "unknown argument 'every_n_batches': no "
    "class has been named that could take it. Name the class before it.",
    "--model.task=Reconstruction --model.task.decoder=ConvDecoder --model.task.decoder.out_channels=x": "model.task."
    "init_args.decoder.init_args.out_channels must be an integer; got x (an argument of ddcl_lightning.ConvDecoder)",
    "--model.task=Reconstruction --model.task.decoder=ConvDecoder --model.task.decoder.out_chanels=3": "unknown "
    "argument 'out_chanels' of ddcl_lightning.ConvDecoder. Did you mean 'out_channels'?",
}


@pytest.mark.parametrize("words", ADDED)
def test_a_wrong_value_of_an_inner_class_is_not_called_an_unknown_argument(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_line(capsys, "--config", "digits", *words.split()).startswith(ADDED[words])


def first_line(capsys: pytest.CaptureFixture[str], *words: str, command: str = "fit") -> str:
    with pytest.raises(SystemExit) as stop:
        main([command, *words])
    assert stop.value.code == 2
    return next(line[7:] for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_wrong_type(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_line(capsys, "--config", "digits", word).startswith(WORDS[word])


def test_a_value_of_the_wrong_type_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipe_paths()["digits"].read_text()
    for key, value, message in (
        ("num_prototypes", "many", "model.head.init_args.num_prototypes must be an integer; got many"),
        ("start", "[a]", "trainer.callbacks.init_args.start must be "),
        ("max_epochs", "ten", "trainer.max_epochs must be an integer or null; got ten."),
    ):
        (tmp_path / "a.yaml").write_text(re.sub(rf"\b{key}: [^,}}\n]+", f"{key}: {value}", text), encoding="utf-8")
        assert first_line(capsys, "--config", str(tmp_path / "a.yaml")).startswith(message)


REQUIRED = "data.init_args.path must be given: ddcl_lightning.TextDataModule has no default for it; got null."
NULLS: dict[str, str] = {
    "--data=null": "data must be given; got null. Pass --data CLASS",
    "--data.init_args=null": "data.init_args must hold arguments by name; got null.",
    "--data.class_path=null": "data.class_path must be the name of a class; got null. Pass --data CLASS.",
    "--data.init_args.batch_size=null": "batch_size must be an integer; got None.",
    "--data=TextDataModule": REQUIRED,
    "--data=TextDataModule --data.path=null": REQUIRED,
    "--data=TextDataModule --data.init_args.path=null": REQUIRED,
    "--data=TextDataModule --data.path=a.csv --data.drop_empty=null": "drop_empty must be True or False; got None.",
    "--model=null": "model must hold settings by name; got null.",
    "--model.rho=null": "model.rho must be a number; got null.",
    "--model.head=null": "model.head must be the name of a Head; got null.",
    "--model.head.init_args=null": "model.head.init_args must hold arguments by name; got null.",
    "--model.head.class_path=null": "model.head.class_path must be the name of a class; got null.",
    "--model.head.num_prototypes=null": "model.head.init_args.num_prototypes must be given: ",
    "--model.task=Reconstruction --model.task.decoder=null": "model.task.init_args.decoder must be given: ",
}


@pytest.mark.parametrize("words", NULLS)
def test_null_where_a_value_is_needed(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = first_line(capsys, "--config", "digits", *words.split())
    assert line.startswith(NULLS[words])
    assert "Namespace" not in line
    assert "NestedArg" not in line


@pytest.mark.parametrize("command", ["validate", "test", "predict", "explain"])
@pytest.mark.parametrize("words", ["--data=TextDataModule --data.init_args.path=null", "--data.init_args=null"])
def test_null_is_refused_by_every_command(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = first_line(capsys, "--config", "digits", *words.split(), command=command)
    assert line.startswith(NULLS[words])


MODEL = """model:
  backbone: {class_path: PCABackbone, init_args: {in_features: 64, num_components: 4}}
  task: Clustering
"""
HEAD = "  head: {class_path: DDCLReadout, init_args: {num_prototypes: 4}}\n"
NULL_FILES: dict[str, str] = {
    f"{MODEL}{HEAD}data: null": NULLS["--data=null"],
    f"{MODEL}{HEAD}data: {{class_path: null}}": NULLS["--data.class_path=null"],
    f"{MODEL}{HEAD}data: {{class_path: DigitsDataModule, init_args: null}}": NULLS["--data.init_args=null"],
    f"{MODEL}{HEAD}data: {{class_path: TextDataModule, init_args: {{path: null}}}}": REQUIRED,
    f"{MODEL}{HEAD}data: TextDataModule": REQUIRED,
    f"{MODEL}{HEAD}data: {{init_args: {{path: null}}}}": "data must name a class of its own; got ",
    f"{MODEL}  head: {{class_path: DDCLReadout, init_args: null}}\ndata: DigitsDataModule": (
        "model.head.init_args must hold arguments by name; got null."
    ),
    f"{MODEL}  head: {{init_args: {{num_prototypes: 4}}}}\ndata: DigitsDataModule": (
        "model.head must be the name of a Head; got {'init_args'"
    ),
    f"{MODEL}  head: null\ndata: DigitsDataModule": "model.head must be given; got null. Pass --model.head CLASS",
    "model: null\ndata: DigitsDataModule": "model.backbone and model.head and model.task must be given; got null.",
}


@pytest.mark.parametrize("text", NULL_FILES)
def test_null_in_a_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert first_line(capsys, "--config", str(tmp_path / "a.yaml")).startswith(NULL_FILES[text])


def test_arguments_alone_name_no_class(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--data.init_args.path", "null"], ["--data.batch_size", "3"]):
        assert first_line(capsys, *words).startswith("data must name a class of its own; got lightning.LightningData")


def test_other_messages_are_left_alone() -> None:
    assert missing_value("nothing of the kind") is None
    assert missing_value('Parser key "a":\n  something else') is None
    assert wrong_value("nothing of the kind") is None
    assert wrong_value('Parser key "a":\n  something else') is None


FILES: dict[str, tuple[bytes, str]] = {
    "latin-1": ("a: é".encode("latin-1"), "must be in UTF-8; byte 3 is not"),
    "UTF-16": ("a: b".encode("utf-16"), "must be in UTF-8; byte 0 is not"),
    "empty": (b"", "must hold settings by name, such as 'model:'; got 'nothing'"),
    "list": (b"- a", "must hold settings by name"),
    "text": (b"hello", "must hold settings by name"),
    "tabs": (b"a:\n\tb: 1", r"must be YAML; .* in line 2. Indent by spaces, not tabs"),
    "unclosed": (b"a: {b: [", "must be YAML; .* in line 1"),
    "control character": (b"a: \x00", "must be YAML; unacceptable character"),
    "key twice": (b"a: 1\nb: 2\na: 3", "must give every key once; 'a' is in lines 1 and 3"),
    "inner key twice": (b"a:\n  - {b: 1, b: 2}", "must give every key once; 'b' is in lines 2 and 2"),
    "deep": (b"a: " + b"[" * 5000, "must not be nested so deeply"),
    "itself": (b"a: &x [*x]", "must not contain itself"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_config(tmp_path / "a.yaml")


def test_a_folder_is_no_config_and_a_byte_order_mark_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be a file that you may read" in first_line(capsys, "--config", str(tmp_path))
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: &x {b: 1}\nc: *x\n")
    check_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", sorted(recipe_paths()))
def test_recipes_are_configs(name: str) -> None:
    check_config(recipe_paths()[name])


def changed(folder: Path, **arrays: Any) -> Path:
    with np.load(jpeg_file(folder / "a.npz")) as file:
        held = {**file, **arrays}
    np.savez(folder / "b.npz", **held)
    return folder / "b.npz"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(60, 99), r"labels must be numbers of classes in \[0, 10\), or -1 for unlabelled; row 0 has 99"),
        (np.full(60, -7), "row 0 has -7"),
        (np.full(60, np.nan), "y_train of .* must be whole numbers"),
        (np.full(60, 2.5), "y_train of .* must be whole numbers"),
        (np.full(60, "cat"), "y_train of .* must be whole numbers"),
        (np.full(60, True), "y_train of .* must be whole numbers"),
    ],
    ids=str,
)
def test_labels_of_an_npz_file(labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(changed(tmp_path, y_train=labels)).setup()


def test_labels_of_an_idx_file(tmp_path: Path) -> None:
    import gzip

    file = idx_folder(tmp_path / "idx") / "t10k-labels-idx1-ubyte.gz"
    data = bytearray(gzip.decompress(file.read_bytes()))
    data[-1] = 77
    file.write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(ValueError, match="row 79 has 77"):
        MNISTDataModule(file.parent).setup()


TABLES: dict[str, tuple[str, bytes]] = {
    "latin-1": ("a.csv", "text,label\né,1\n".encode("latin-1")),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "empty": ("a.csv", b""),
    "header alone": ("a.csv", b"text,label\n"),
    "torn": ("a.csv.gz", b"\x1f\x8b\x08\x00torn"),
    "no gzip": ("a.jsonl.gz", b"plain"),
    "no column": ("a.csv", b"words,more,label\na,b,1\n"),
    "number": ("a.jsonl", b'{"text": 3, "label": 1}'),
    "label": ("a.jsonl", b'{"text": "a", "label": 1.5}'),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_cannot_be_used_is_one_sentence(name: str, tmp_path: Path) -> None:
    file, content = TABLES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"must|row 1|labels") as error:
        TextDataModule(tmp_path / file).setup()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="catalogue must"):
        DebrisDataModule(catalogue=tmp_path / file).setup()


def test_a_torn_npz_archive_is_refused_in_one_sentence(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(9))
    for content in (buffer.getvalue()[:40], b"", b"plain"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"path must be an \.npz file with"):
            CIFAR10DataModule(tmp_path / "a.npz").setup()
