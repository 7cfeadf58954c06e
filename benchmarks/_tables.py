"""Tables from the runs of a study: rows of cases, and columns that are functions of a case's runs."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]
Run = dict[str, Any]
Table = list[list[str]]  # the first row is the header
Value = str | Callable[[Run], Any]  # what a column reads of a run: a key ("test.mse" looks deeper), or a function
Cell = Callable[[list[Run]], str]  # text of a column from the runs of a case


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
