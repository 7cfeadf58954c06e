"""Labels in a column of a table, as numbers of classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddcl_lightning._utils.arguments import LARGEST

UNKNOWN = -1
_INTEGER = re.compile(r"-?[0-9]+")
_WHOLE_FLOAT = re.compile(r"(-?[0-9]+)\.0")  # as pandas writes a column of integers with gaps


def check_labels(labels: Sequence[Any], column: str, path: str | Path) -> None:
    """Refuse labels of a table that can be no classes, by their row.

    Args:
        labels: Cells of the column.
        column: Its name.
        path: Of the table.

    Raises:
        ValueError: If one is neither an integer of at least 0 nor a name, or is true or false beside others, or if all
            are numbers and one is not whole.
    """
    rule = "labels must be names, or integers of at least 0 (-1, empty or null where there is none)"
    kinds = {type(label) for label in labels if label is not None}
    numeric = all(_is_number(label) for label in labels)
    for row, label in enumerate(labels, start=1):
        if label is None or label != label or label == UNKNOWN:
            continue
        whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
        fits = abs(label) <= LARGEST and (whole and label >= 0) if isinstance(label, (int, float)) else True
        text = label.strip() if isinstance(label, str) else ""
        if text and numeric:
            whole_text = _WHOLE_FLOAT.fullmatch(text) or _INTEGER.fullmatch(text)
            fits = whole_text is not None and len(text) < 19 and float(text) >= UNKNOWN
        if not (fits and isinstance(label, (int, float, str))) or (isinstance(label, bool) and kinds != {bool}):
            shown = repr(label) if len(repr(label)) <= 40 else f"{repr(label)[:40]}..."
            raise ValueError(f"{rule}; row {row} of {path} has {shown} as {column!r}. Correct it, or leave it empty.")


def _is_number(label: Any) -> bool:
    """True for a number, a text of one, and for no label."""
    if not isinstance(label, str):
        return label is None or isinstance(label, (int, float))
    try:
        float(label.strip() or "0")
    except ValueError:
        return False
    return True


def class_numbers(
    labels: Sequence[Any], num_train: int, known: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[int]]:
    """Number the classes: integers in their order, names alphabetically.

    Args:
        labels: Integers or names, training rows first. None, ``""`` and -1 mean unlabelled.
        num_train: Training rows, whose labels are all that a classifier can learn.
        known: Names of the classes, where they are known: then labels are names or numbers of them.

    Returns:
        Names of the classes, and the number of each row, -1 where unlabelled.

    Raises:
        ValueError: If a label is neither an integer nor a string, is not one of ``known``, or occurs outside of the
            training rows alone while these have labels.
    """
    cells = [_label(label) for label in labels]
    given = {cell for cell in cells if cell is not None}
    integers = all(_INTEGER.fullmatch(cell) for cell in given)
    ordered = sorted(given, key=int) if integers else sorted(given)
    if integers and ordered and int(ordered[0]) < 0:
        raise ValueError(f"integer labels must be at least 0, or -1 for unlabelled; got {ordered[0]}. Pass 0 or more.")
    if known is None:
        classes = tuple(ordered)
        numbers = {name: number for number, name in enumerate(classes)}
    else:
        classes = known
        numbers = {spelling: number for number, name in enumerate(known) for spelling in (name, str(number))}
    invalid = [cell for cell in ordered if cell not in numbers]
    if invalid:
        raise ValueError(
            f"labels must be one of {', '.join(classes)} or their numbers; got {', '.join(invalid[:5])}. Use "
            "TextDataModule for classes of your own."
        )
    numbered = [UNKNOWN if cell is None else numbers[cell] for cell in cells]
    learned = set(numbered[:num_train]) - {UNKNOWN}
    new = sorted(set(numbered[num_train:]) - {UNKNOWN} - learned)
    if learned and new:
        raise ValueError(
            "every label must occur in the training rows; only validation or test rows have "
            f"{', '.join(classes[label] for label in new[:5])}. Move such rows, or drop them."
        )
    return classes, numbered


def _label(value: Any) -> str | None:
    """A label in its one spelling, None for an unlabelled row."""
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps
        value = int(value)
    if value is None or value != value or value == UNKNOWN:
        return None
    if not isinstance(value, (int, str)):
        raise ValueError(f"labels must be integers or strings; got {value!r}. Convert them, or pass label=None.")
    cell = str(value).strip()
    whole = _WHOLE_FLOAT.fullmatch(cell)
    cell = whole[1] if whole else cell
    return None if cell in ("", str(UNKNOWN)) else cell
