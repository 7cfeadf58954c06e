"""Classes of the data that a model was trained on, kept with it and held against the data of every later stage.

A label is a place in the list of the data's class names, so the results of a model on data with another list look like
any others and are wrong.
"""

from numbers import Integral
from typing import Any, TypeGuard

import numpy as np

from ddcl_lightning._utils import compat
from ddcl_lightning.tasks.readout_module import ReadoutModule

CHECKPOINT_KEY = "ddcl_class_names"
_LISTED = 12  # names in one line

Classes = list[str] | int  # their names, or how many there are where they have none


def classes_of(data: Any) -> Classes | None:
    """The classes of a data module: its ``class_names``, else its ``num_classes``; None where it has neither.

    Args:
        data: A data module after setup, or None.
    """
    return _classes(getattr(data, "class_names", None)) or _classes(getattr(data, "num_classes", None))


class ClassNames(ReadoutModule):
    """A readout module that refuses data whose classes are not those that it was trained on.

    Only tasks that have a ``num_classes`` compare anything, and only with data that says what its classes are.
    """

    _trained_classes: Classes | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the classes."""
        if self._trained_classes is not None:
            checkpoint[CHECKPOINT_KEY] = self._trained_classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the classes of the checkpoint; those of earlier versions hold none."""
        self._trained_classes = _classes(checkpoint.get(CHECKPOINT_KEY))

    def on_fit_start(self) -> None:
        """Remember the classes of the training data; a resumed run must find those that it began with.

        Raises:
            ValueError: If it does not, or the data has more classes than the task knows of.
        """
        data = compat.current_datamodule(self.trainer)
        self._refuse_more_classes(data)
        if self.trainer.ckpt_path is None:
            self._trained_classes = classes_of(data)
        else:
            self.refuse_other_classes(data)
            self._trained_classes = classes_of(data) or self._trained_classes

    def on_validation_start(self) -> None:
        """Refuse data with other classes."""
        self.refuse_other_classes(compat.current_datamodule(self.trainer))

    on_test_start = on_predict_start = on_validation_start

    def refuse_other_classes(self, data: Any) -> None:
        """Refuse data whose classes differ in number, name or order from those of the training data.

        Args:
            data: A data module after setup, or None.

        Raises:
            ValueError: If they do; names both.
        """
        trained, given = self._trained_classes, classes_of(data)
        if trained is None or given is None or not _is_count(getattr(self.task, "num_classes", None)):
            return
        if isinstance(trained, list) and isinstance(given, list):
            same = trained == given
        else:
            same = _count(trained) == _count(given)
        if not same:
            raise ValueError(
                f"the data must have the classes that the model was trained on, {_listing(trained)}; got "
                f"{_listing(given)}{_first_difference(trained, given)}. A label is a place in that list, so the "
                "results would be wrong. Use data with the same class names in the same order, or train a model on it."
            )

    def _refuse_more_classes(self, data: Any) -> None:
        """Say at once, and in the data's own names, that there are more classes than the task knows of."""
        given, known = classes_of(data), getattr(self.task, "num_classes", None)
        if given is not None and _is_count(known) and _count(given) > known:
            raise ValueError(
                f"num_classes of the task must be at least that of the data, {_listing(given)}; got {known}. Set it "
                "(--model.task.init_args.num_classes), or correct the labels."
            )


def _classes(value: Any) -> Classes | None:
    """Names or a number of classes as a checkpoint can hold them; None for what says nothing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [str(name) for name in value] or None
    return int(value) if _is_count(value) and value > 0 else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(classes: Classes) -> int:
    return classes if isinstance(classes, int) else len(classes)


def _listing(classes: Classes) -> str:
    """``"2: 'ham', 'spam'"``, or the number alone."""
    if isinstance(classes, int):
        return str(classes)
    return f"{len(classes)}: " + ", ".join(map(repr, classes[:_LISTED])) + ", ..." * (len(classes) > _LISTED)


def _first_difference(trained: Classes, given: Classes) -> str:
    """Phrase about the first place in which two lists differ beyond what is listed of them."""
    if isinstance(trained, int) or isinstance(given, int) or trained[:_LISTED] != given[:_LISTED]:
        return ""
    pairs = enumerate(zip(trained, given, strict=False))
    return next((f" (class {place} was {old!r}, and is {new!r})" for place, (old, new) in pairs if old != new), "")
