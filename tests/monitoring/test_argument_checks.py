"""Wrong arguments of a plain loop: one sentence each, that names the argument, the rule, the value and the way out."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddcl_lightning import CodebookMonitor, VectorQuantizer, find_codebooks
from ddcl_lightning.callbacks import CollapseWarning
from ddcl_lightning.functional import largest_stable_rate

TOKENS, CODES, INDICES = torch.randn(6, 2), torch.randn(3, 2), torch.tensor([0, 1, 2, 0, 1, 2])


def state(**changed: Any) -> dict[str, Any]:
    return {**CodebookMonitor().state_dict(), **changed}


SLIPS: dict[str, tuple[Callable[[CodebookMonitor], Any], type[Exception], str]] = {
    "tokens of NumPy": (
        lambda monitor: monitor.update(TOKENS.numpy(), CODES, INDICES),
        TypeError,
        r"tokens must be a tensor or None; got a ndarray\. Convert it with torch\.as_tensor\.",
    ),
    "a codebook of NumPy": (
        lambda monitor: monitor.update(TOKENS, CODES.numpy(), INDICES),
        TypeError,
        "codebook must be a tensor or None; got a ndarray",
    ),
    "indices of NumPy": (
        lambda monitor: monitor.update(TOKENS, CODES, INDICES.numpy()),
        TypeError,
        "indices must be a tensor; got a ndarray",
    ),
    "a list of indices": (
        lambda monitor: monitor.update(TOKENS, CODES, [0, 1, 2, 0, 1, 2]),
        TypeError,
        "indices must be a tensor; got a list of 6",
    ),
    "no indices": (
        lambda monitor: monitor.update(TOKENS, CODES, None),
        TypeError,
        r"indices must be a tensor; got None\. Pass a tensor\.",
    ),
    "a mask of NumPy": (
        lambda monitor: monitor.update(TOKENS, CODES, INDICES, np.ones(6, dtype=bool)),
        TypeError,
        "mask must be a tensor or None; got a ndarray",
    ),
    "a loss of letters": (
        lambda monitor: monitor.check("a"),
        TypeError,
        "loss must be a number or a tensor of one; got 'a'. Pass what the step was trained on",
    ),
    "a loss that is True": (lambda monitor: monitor.check(True), TypeError, "a tensor of one; got True"),
    "a loss of each sample": (
        lambda monitor: monitor.check(torch.ones(8)),
        ValueError,
        r"loss must be a number or a tensor of one; got a tensor \(8,\) of torch\.float32\. Reduce it with \.mean\(\)",
    ),
    "an empty loss": (lambda monitor: monitor.check(torch.ones(0)), ValueError, r"got a tensor \(0,\)"),
    "a complex loss": (
        lambda monitor: monitor.check(torch.ones((), dtype=torch.complex64)),
        TypeError,
        "of torch.complex64",
    ),
    "a loss of NumPy's": (lambda monitor: monitor.check(np.ones(3)), TypeError, "a tensor of one; got array"),
    "a step of letters": (
        lambda monitor: monitor.check(step="3"),
        TypeError,
        "step must be an integer or None; got '3'. Pass the number of the step.",
    ),
    "a step with a fraction": (lambda monitor: monitor.check(step=2.5), TypeError, "step must be an integer"),
    "an end that is a number": (
        lambda monitor: monitor.check(planned_end=3),
        TypeError,
        "planned_end must map the names of banks .*; got 3. Pass {name: temperature}",
    ),
    "an end of letters": (
        lambda monitor: monitor.check(planned_end={"bank": "cold"}),
        TypeError,
        "planned_end must map .*; got 'bank': 'cold'",
    ),
    "an empty state": (
        lambda monitor: monitor.load_state_dict({}),
        ValueError,
        r"state must be what CodebookMonitor\.state_dict\(\) gave; got one without 'windows', 'judge'.* start anew",
    ),
    "a part of a state": (
        lambda monitor: monitor.load_state_dict({k: v for k, v in state().items() if k != "judge"}),
        ValueError,
        "got one without 'judge'. Pass the state of a CodebookMonitor",
    ),
    "a state of other things": (
        lambda monitor: monitor.load_state_dict(state(windows=3)),
        ValueError,
        "got an int under 'windows'",
    ),
    "no state": (lambda monitor: monitor.load_state_dict(None), ValueError, "gave; got None"),
    "kinds of no codebook": (
        lambda monitor: CodebookMonitor(VectorQuantizer(2, 3), kinds=[int]),
        ValueError,
        r"kinds must be a list of subclasses of CodebookSource; got \[<class 'int'>\]",
    ),
    "kinds of a callback": (
        lambda monitor: CollapseWarning(kinds=[int]),
        ValueError,
        "kinds must be a list of subclasses of CodebookSource",
    ),
    "kinds of a search": (
        lambda monitor: find_codebooks(VectorQuantizer(2, 3), kinds=[int]),
        ValueError,
        r"kinds must hold subclasses of CodebookSource; got int\. Write one",
    ),
    "an object for a kind": (
        lambda monitor: find_codebooks(VectorQuantizer(2, 3), kinds=["vq"]),
        ValueError,
        "kinds must hold subclasses of CodebookSource; got a str",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_wrong_argument_of_a_monitor_is_one_sentence(name: str) -> None:
    action, error, message = SLIPS[name]
    monitor = CodebookMonitor()
    monitor.update(TOKENS, CODES, INDICES)
    before = monitor.state_dict()
    with pytest.raises(error, match=message):
        action(monitor)
    assert repr(monitor.state_dict()) == repr(before)  # nothing of it was taken


LOSSES = [1, 2.0, math.nan, np.float32(3), torch.tensor(1.5), torch.ones(1, 1), torch.tensor(2)]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_single_number_is_a_loss(loss: Any) -> None:
    monitor = CodebookMonitor(on_collapse="ignore")
    monitor.update(TOKENS, CODES, INDICES)
    findings = monitor.check(loss, step=np.int64(4))
    assert [finding.sign for finding in findings if finding.step == 4] == (["non_finite"] if loss != loss else [])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_a_rate_of_no_prototypes_is_refused(shape: tuple[int, ...]) -> None:
    message = r"mass must hold one number for each of at least one prototype, \(\.\.\., K\); got shape"
    with pytest.raises(ValueError, match=message):
        largest_stable_rate(torch.ones(shape))


def test_no_banks_have_no_rates() -> None:
    assert largest_stable_rate(torch.ones(0, 3)).shape == (0,)
