"""One schedule for all rates."""

import math

import pytest

from ddcl_lightning import LRSchedule


def test_schedules_warm_up_and_decay_as_defined() -> None:
    assert [LRSchedule("constant", 3).factor(step, math.inf) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [LRSchedule("linear").factor(step, 4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [LRSchedule("linear", 2).factor(step, 6) for step in range(2, 6)] == [1.0, 0.75, 0.5, 0.25]
    cosine = [LRSchedule("cosine").factor(step, 4) for step in range(5)]
    assert cosine == pytest.approx([1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0], abs=1e-12)
    for schedule in ("linear", "cosine"):
        assert LRSchedule(schedule, 3).factor(3, 2) == 1.0  # a run that ends with its warm-up


def test_schedules_refuse_unknown_names_and_runs_without_length() -> None:
    with pytest.raises(ValueError, match=r"lr_schedule must be one of.*got 'step'"):
        LRSchedule("step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup_steps must be >= 0; got -1"):
        LRSchedule("linear", -1)
    with pytest.raises(ValueError, match="needs a run of known length"):
        LRSchedule("cosine").factor(5, math.inf)
