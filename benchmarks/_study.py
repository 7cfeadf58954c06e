"""A study: cases with a plain configuration, seeds, one function that runs a case, and the tables made of the runs.

A study is one file of this folder: a :class:`Study` named like the file, and ``STUDY.main()``. Its results are
``results/NAME.json``: versions, settings, the configuration of every case, a run per case and seed, and the tables,
which ``render.py`` writes between the markers of the documentation. An interrupted study goes on where it was stopped.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from _tables import Config, Results, Run, Table
from render import ROOT, markdown

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

# Files that a study may need: options of the command line, and fields of :class:`Options`.
PATHS = {
    "encoder": "folder of a Hugging Face encoder of BERT's kind",
    "texts": "folder of sst2_glue.jsonl.gz, imdb_10k_5k.jsonl.gz and 20newsgroups_bydate_stripped.jsonl.gz",
    "cache": "folder that keeps the features of frozen encoders",
    "fashion": "folder of the four idx files of Fashion-MNIST",
    "cifar": "CIFAR-10 as JPEG bytes in one .npz",
    "checkpoint": "ImageNet weights of tf_efficientnet_lite0",
    "catalogue": "catalogue of objects in Earth orbit, .csv.gz",
    "recordings": "folder that keeps the recorded runs of collapse_warning",
}


@dataclass(frozen=True)
class Options:
    """Options of the command line for ``run``: ``--quick``, and the files of :data:`PATHS`, None where not given."""

    quick: bool
    encoder: Path | None = None
    texts: Path | None = None
    cache: Path | None = None
    fashion: Path | None = None
    cifar: Path | None = None
    checkpoint: Path | None = None
    catalogue: Path | None = None
    recordings: Path | None = None


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
    run: Callable[[Config, int, Options], Run]
    tables: Mapping[str, Callable[[Results], Table]]
    seeds: Sequence[int] = (0,)
    settings: Config | Callable[[Options], Config] = field(default_factory=dict)
    quick: Mapping[str, Case] | None = None
    packages: tuple[str, ...] = ()
    picture: Callable[[Results, Path], None] | None = None
    threads: int = 1

    def main(self, description: str | None, arguments: Sequence[str] | None = None) -> None:
        """Run what is missing, and make the tables."""
        parser = _parser(description)
        given = parser.parse_args(arguments)
        folder = given.output or (Path(tempfile.mkdtemp()) if given.quick else RESULTS)
        path = folder / f"{self.name}.json"
        if given.quick and folder.resolve() == RESULTS:
            parser.error(f"--output must be another folder than the results of full runs under --quick; got {folder}.")
        if given.tables and not path.is_file():
            parser.error(f"--tables needs results of an earlier run; got none at {path}.")
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self._empty()
        if given.tables:
            self._refuse_stale(content)
        else:
            options = Options(given.quick, **{name: getattr(given, name) for name in PATHS})
            try:
                cases = self._choose(options, given.cases)
            except ValueError as error:
                parser.error(str(error))
            _prepare(self.threads)
            self._measure(content, cases, given.seeds, options, path)
        self.summarize(content)
        _write(path, content)
        for name, table in content["tables"].items():
            print(f"\n{self.name}/{name}\n\n{markdown(table)}", end="")
        if self.picture is not None:
            self.picture(self.results(content), DOCS if folder == RESULTS else folder)

    def results(self, content: dict[str, Any]) -> Results:
        """The runs with the labels of now."""
        return Results(content, {name: case.label for name, case in self._all_cases().items()})

    def summarize(self, content: dict[str, Any]) -> None:
        """Make the tables anew."""
        results = self.results(content)
        content["tables"] = {name: create(results) for name, create in self.tables.items()}

    def _all_cases(self) -> dict[str, Case]:
        return {
            **self.cases,
            **(self.quick or {}),
            **self.cases,
        }  # in the order, and with the configurations, of the cases

    def _empty(self) -> dict[str, Any]:
        return {"study": self.name, "versions": self._versions(), "settings": None, "cases": {}, "runs": []}

    def _versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("torch", "lightning", "scikit-learn", *self.packages)}

    def _refuse_stale(self, content: dict[str, Any]) -> None:
        """Tables are made of runs under the configurations of now."""
        configs = {name: _plain(case.config) for name, case in self._all_cases().items()}
        stale = [name for name, config in content["cases"].items() if configs.get(name) != config]
        if stale:
            raise SystemExit(f"the configuration of {', '.join(stale)} is not that of the runs. Run these cases anew.")

    def _choose(self, options: Options, patterns: list[str]) -> dict[str, Case]:
        """Cases that are asked for and have their files."""
        cases = self.quick if options.quick and self.quick is not None else self.cases
        chosen = {name: case for name, case in cases.items() if any(fnmatchcase(name, each) for each in patterns)}
        if not chosen:
            raise ValueError(f"--cases must match ids of this study, {', '.join(cases)}; got {' '.join(patterns)}.")
        missing = {
            name: [need for need in case.needs if getattr(options, need) is None] for name, case in chosen.items()
        }
        ready = {name: case for name, case in chosen.items() if not missing[name]}
        if not ready:
            needs = sorted({f"--{need}" for names in missing.values() for need in names})
            raise ValueError(f"these cases need {', '.join(needs)}; got none.")
        if len(ready) < len(chosen):
            print("left out, for their files are not given:", *(name for name in chosen if name not in ready))
        return ready

    def _measure(
        self, content: dict[str, Any], cases: dict[str, Case], seeds: list[int] | None, options: Options, path: Path
    ) -> None:
        """Run the cases and seeds that have no run yet, and keep each run at once."""
        settings = _plain(self.settings(options) if callable(self.settings) else self.settings)
        if content["settings"] not in (None, settings):
            raise SystemExit(
                f"the runs of {path.name} need the settings of this study, {settings}; got {content['settings']}. Give "
                "another --output, or remove the file to measure anew."
            )
        content["settings"] = settings
        for name, case in cases.items():
            config = _plain(case.config)
            if content["cases"].get(name, config) != config:  # another case under the same id
                content["runs"] = [run for run in content["runs"] if run["case"] != name]
            content["cases"][name] = config
            done = {run["seed"] for run in content["runs"] if run["case"] == name}
            for seed in (seeds or case.seeds or self.seeds)[: 1 if options.quick else None]:
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


def _parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny version that only shows that the study runs")
    parser.add_argument("--tables", action="store_true", help="run nothing: make the tables of the results anew")
    parser.add_argument("--output", type=Path, help="folder of the results; with --quick a temporary one by default")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="ids of cases; * is any text")
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
