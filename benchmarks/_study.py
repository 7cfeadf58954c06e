"""A study: cases with a plain configuration, seeds, one function that runs a case, and the tables made of the runs.

A study is one file of this folder: a :class:`Study` named like the file, and ``STUDY.main()``. Its results are
``results/NAME.json``: versions, settings, the configuration of every case, a run per case and seed, and the tables,
which ``render.py`` writes between the markers of the documentation. An interrupted study goes on where it was stopped.
"""

import argparse
import fnmatch
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from render import ROOT, markdown

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

Config = Mapping[str, Any]
Run = dict[str, Any]
Table = list[list[str]]  # the first row is the header
Value = str | Callable[[Run], Any]  # what a column reads of a run: a key ("test.mse" looks deeper), or a function
Cell = Callable[[list[Run]], str]  # text of a column from the runs of a case

# Files that a study may need, as options of the command line.
PATHS = {
    "encoder": "folder of a Hugging Face encoder of BERT's kind",
    "texts": "folder of sst2_glue.jsonl.gz, imdb_10k_5k.jsonl.gz and 20newsgroups_bydate_stripped.jsonl.gz",
    "cache": "folder that keeps the features of frozen encoders",
    "fashion": "folder of the four idx files of Fashion-MNIST",
    "cifar": "CIFAR-10 as JPEG bytes in one .npz",
    "checkpoint": "ImageNet weights of tf_efficientnet_lite0",
    "catalogue": "catalogue of objects in Earth orbit, .csv.gz",
}


@dataclass(frozen=True)
class Case:
    """One thing that is compared.

    Attributes:
        label: Its name in the tables.
        config: Plain numbers and strings that set it apart; kept with the results, which hold for no other.
        needs: Options that it cannot run without; see :data:`PATHS`.
        seeds: Seeds of this case in the place of the study's.
    """

    label: str
    config: Config = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seeds: Sequence[int] | None = None


class Results:
    """The runs of a study, as its tables read them.

    Attributes:
        settings: What all cases have in common.
        runs: All runs, each with its ``case`` and ``seed``.
        configs: Configuration of each case by its id.
    """

    def __init__(self, content: dict[str, Any], labels: Mapping[str, str]) -> None:
        self.settings: dict[str, Any] = content["settings"]
        self.runs: list[Run] = content["runs"]
        self.configs: dict[str, Config] = content["cases"]
        self.labels = labels

    def of(self, case: str) -> list[Run]:
        """Runs of a case, by seed."""
        return sorted((run for run in self.runs if run["case"] == case), key=lambda run: run["seed"])

    def where(self, **config: Any) -> list[str]:
        """Ids of the cases that have been run and whose configuration has these values, in the order of the study."""
        return [
            name
            for name in self.labels
            if name in self.configs and all(self.configs[name].get(key) == value for key, value in config.items())
        ]

    def table(self, first: str, cases: Iterable[str], columns: Mapping[str, Cell]) -> Table:
        """A row per case that has been run: its label, and the cells."""
        rows = ((name, self.of(name)) for name in cases)
        body = [[self.labels[name], *(cell(runs) for cell in columns.values())] for name, runs in rows if runs]
        return [[first, *columns], *body]


def read(runs: Iterable[Run], value: Value) -> list[Any]:
    """A value of every run that has it."""
    values = (_look_up(run, value) if isinstance(value, str) else value(run) for run in runs)
    return [value for value in values if value is not None]


def _look_up(run: Run, keys: str) -> Any:
    value: Any = run
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def mean(value: Value, form: str = ".3f", deviation: bool = True) -> Cell:
    """``mean ± standard deviation``, without the latter for a single run."""

    def cell(runs: list[Run]) -> str:
        numbers = read(runs, value)
        if not numbers:
            return ""
        spread = f" ± {statistics.stdev(numbers):{form}}" if deviation and len(numbers) > 1 else ""
        return f"{statistics.fmean(numbers):{form}}{spread}"

    return cell


def extreme(pick: Callable[[list[Any]], Any], value: Value, form: str = ".3f") -> Cell:
    """The value that ``pick`` (``min``, ``max``, ``sum``) makes of all runs."""

    def cell(runs: list[Run]) -> str:
        numbers = read(runs, value)
        return f"{pick(numbers):{form}}" if numbers else ""

    return cell


def same(value: Value, form: str = "") -> Cell:
    """A value that is the same in all runs: that of the first."""
    return extreme(lambda numbers: numbers[0], value, form)


def interval(value: Value, form: str = "") -> Cell:
    """``lowest to highest``, or the one value."""

    def cell(runs: list[Run]) -> str:
        numbers = read(runs, value)
        ends = dict.fromkeys(f"{pick(numbers):{form}}" for pick in (min, max)) if numbers else {}
        return " to ".join(ends)

    return cell


def joined(*cells: Cell, separator: str = ", ") -> Cell:
    """Several values in one column."""
    return lambda runs: separator.join(filter(None, (cell(runs) for cell in cells)))


@dataclass(frozen=True)
class Study:
    """Everything that a study says about itself.

    Attributes:
        name: That of its file, of its results and of its markers in the documentation, ``NAME/TABLE``.
        cases: What is compared, by id. An id is lasting: labels may change, ids and configurations may not.
        run: ``run(config, seed, options)`` measures one case with one seed and returns plain numbers.
        tables: Tables of the documentation by name, each a function of the results.
        seeds: Seeds of every case that has none of its own.
        settings: What all cases have in common, plain; or a function of the options that returns it.
        quick: Cases of ``--quick``, by default all; they take their first seed.
        packages: Packages whose versions matter, beside torch, lightning and scikit-learn.
        picture: ``picture(results, folder)`` draws into the documentation.
        threads: Threads of torch.
    """

    name: str
    cases: Mapping[str, Case]
    run: Callable[[Config, int, argparse.Namespace], Run]
    tables: Mapping[str, Callable[[Results], Table]]
    seeds: Sequence[int] = (0,)
    settings: Config | Callable[[argparse.Namespace], Config] = field(default_factory=dict)
    quick: Mapping[str, Case] | None = None
    packages: tuple[str, ...] = ()
    picture: Callable[[Results, Path], None] | None = None
    threads: int = 1

    def main(self, description: str | None, arguments: Sequence[str] | None = None) -> None:
        """Run what is missing, and make the tables."""
        parser = _parser(description)
        options = parser.parse_args(arguments)
        folder = options.output or (Path(tempfile.mkdtemp()) if options.quick else RESULTS)
        path = folder / f"{self.name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self._empty()
        if not options.tables:
            _prepare(self.threads)
            self._measure(content, options, parser, path)
        self.summarise(content)
        _write(path, content)
        for name, table in content["tables"].items():
            print(f"\n{self.name}/{name}\n\n{markdown(table)}", end="")
        if self.picture is not None:
            self.picture(self.results(content), DOCS if folder == RESULTS else folder)

    def results(self, content: dict[str, Any]) -> Results:
        """The runs with the labels of now."""
        return Results(content, {name: case.label for name, case in {**self.cases, **(self.quick or {})}.items()})

    def summarise(self, content: dict[str, Any]) -> None:
        """Make the tables anew."""
        results = self.results(content)
        content["tables"] = {name: create(results) for name, create in self.tables.items()}

    def _empty(self) -> dict[str, Any]:
        return {"study": self.name, "versions": self._versions(), "settings": None, "cases": {}, "runs": []}

    def _versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("torch", "lightning", "scikit-learn", *self.packages)}

    def _measure(
        self, content: dict[str, Any], options: argparse.Namespace, parser: argparse.ArgumentParser, path: Path
    ) -> None:
        """Run the cases that have no run yet, and keep each run at once."""
        settings = _plain(self.settings(options) if callable(self.settings) else self.settings)
        if content["settings"] not in (None, settings):
            raise SystemExit(
                f"the runs of {path.name} need the settings of this study, {settings}; got {content['settings']}. Give "
                "another --output, or remove the file to measure anew."
            )
        content["settings"] = settings
        for name, case in self._chosen(options, parser).items():
            config = _plain(case.config)
            if content["cases"].get(name, config) != config:  # another case under the same id
                content["runs"] = [run for run in content["runs"] if run["case"] != name]
            content["cases"][name] = config
            done = {run["seed"] for run in content["runs"] if run["case"] == name}
            seeds = options.seeds or case.seeds or self.seeds
            for seed in seeds[: 1 if options.quick else None]:
                if seed in done:
                    continue
                start = time.process_time()
                run = {"case": name, "seed": seed, **self.run(config, seed, options)}
                run.setdefault("seconds", round(time.process_time() - start, 1))
                if content["versions"] != self._versions():
                    run["versions"] = self._versions()
                content["runs"].append(run)
                _write(path, content)
                print(name, seed, {key: value for key, value in run.items() if isinstance(value, float)}, flush=True)

    def _chosen(self, options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Case]:
        """Cases that are asked for and have their files."""
        cases = self.quick if options.quick and self.quick is not None else self.cases
        chosen = {
            name: case
            for name, case in cases.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.cases)
        }
        if not chosen:
            parser.error(f"--cases must match ids of this study, {', '.join(cases)}; got {' '.join(options.cases)}.")
        missing = {
            name: [f"--{need}" for need in case.needs if getattr(options, need) is None]
            for name, case in chosen.items()
        }
        ready = {name: case for name, case in chosen.items() if not missing[name]}
        if not ready:
            parser.error(f"{' '.join(sorted({need for needs in missing.values() for need in needs}))} must be given.")
        if len(ready) < len(chosen):
            print("left out, for their files are not given:", *(chosen.keys() - ready.keys()))
        return ready


def _parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny version that only shows that the study runs")
    parser.add_argument("--tables", action="store_true", help="run nothing: make the tables of the results anew")
    parser.add_argument("--output", type=Path, help="folder of the results; with --quick a temporary one by default")
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="PATTERN", help="ids of cases; * stands for any text"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="in the place of the study's own")
    for name, text in PATHS.items():
        parser.add_argument(f"--{name}", type=lambda path: Path(path).resolve(), metavar="PATH", help=text)
    return parser


def _prepare(threads: int) -> None:
    """Few threads, and no chatter."""
    import torch

    torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*smaller than the logging|.*LeafSpec")


def _plain(config: Config) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(config, allow_nan=False))


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write the results at once, so that an interrupted run leaves the previous file whole."""
    from ddcl_lightning._utils.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
