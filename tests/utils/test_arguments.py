"""Every number that a public constructor takes, given wrongly: one sentence that names it, never acceptance."""

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from registry import is_concrete, needed

import ddcl_lightning
from ddcl_lightning import (
    Clustering,
    DDCLReadout,
    DDCLReadoutModule,
    IdentityBackbone,
    PrototypeBank,
    backbones,
    callbacks,
    datamodules,
    decoders,
    heads,
    tasks,
)
from ddcl_lightning._utils.arguments import conform, typed
from ddcl_lightning.integrations import vector_quantize

# Estimators check in fit, as scikit-learn wants it (tests/integrations/test_scikit_learn.py); these take no number of
# the user's.
LEFT_OUT = {"BankCallback", "DDCLClustering", "PrototypePooling", "TransformersBackbone", "record_codebooks"}
# Where -1 means something.
NEGATIVE = {("TransformersBackbone", "layer")}


def public_classes() -> dict[str, type]:
    namespaces = (ddcl_lightning, backbones, callbacks, datamodules, decoders, heads, tasks, vector_quantize)
    classes = {name: getattr(space, name) for space in namespaces for name in getattr(space, "__all__", dir(space))}
    return {
        name: kind
        for name, kind in sorted(classes.items())
        if inspect.isclass(kind)
        and kind.__module__.startswith("ddcl_lightning")
        and is_concrete(kind)
        and not issubclass(kind, (tuple, BaseException))
        and not hasattr(kind, "__dataclass_fields__")
        and name not in LEFT_OUT
    }


def kinds(hint: Any) -> list[Any]:
    """Members of a union."""
    return (
        [kind for inner in get_args(hint) for kind in kinds(inner)]
        if type(None) in get_args(hint)
        or (get_origin(hint) is not None and str(get_origin(hint)) in ("typing.Union", "<class 'types.UnionType'>"))
        else [hint]
    )


def wrong_values(kind: str, name: str, hint: Any) -> list[Any]:
    accepted = kinds(hint)
    values: list[Any] = ["3", math.nan, math.inf, -math.inf, [1], np.float32("nan"), torch.tensor(math.nan)]
    if any(get_origin(alternative) in (list, tuple) for alternative in accepted):
        values.remove([1])
    if bool not in accepted:
        values.append(True)
    if float not in accepted:
        values += [2.5, 3.0, np.float64(2.5)]
    if type(None) not in accepted:
        values.append(None)
    if (kind, name) not in NEGATIVE:
        values += [-1, np.int64(-1)]
    return values


CASES = [
    (kind, name, value)
    for kind, cls in public_classes().items()
    for name, hint in get_type_hints(inspect.unwrap(cls.__init__)).items()
    if {int, float} & set(kinds(hint))
    for value in wrong_values(kind, name, hint)
]


@pytest.mark.parametrize(("kind", "name"), sorted({(kind, name) for kind, name, _ in CASES}))
def test_a_wrong_number_is_refused_by_name(kind: str, name: str) -> None:
    cls = public_classes()[kind]
    for value in (value for k, n, value in CASES if (k, n) == (kind, name)):
        with pytest.raises((ValueError, TypeError)) as error:
            cls(**{**needed(cls), name: value})
        assert name in str(error.value), f"{kind}({name}={value!r}): {error.value}"


def test_every_public_class_is_tried() -> None:
    assert len(public_classes()) > 50
    for name, kind in public_classes().items():
        if not issubclass(kind, LightningDataModule):
            continue
        assert (name, "batch_size") in {(kind, argument) for kind, argument, _ in CASES}


@typed
def example(
    count: int = 1,
    share: float = 0.5,
    flag: bool = False,
    sizes: list[int] | None = None,
    pair: tuple[int, int] = (1, 1),
    name: str = "a",
    call: Callable[[], int] | None = None,
    module: torch.nn.Module | None = None,
) -> dict[str, Any]:
    return dict(locals())


def test_scalars_of_numpy_become_plain() -> None:
    instance = example(np.int32(3), np.float32(0.25), np.bool_(True), np.array([1, 2]), [np.int8(1), 2])
    assert {name: type(value) for name, value in instance.items() if name in ("count", "share", "flag")} == {
        "count": int,
        "share": float,
        "flag": bool,
    }
    assert (instance["count"], instance["share"], instance["sizes"], instance["pair"]) == (3, 0.25, [1, 2], [1, 2])
    assert type(instance["pair"][0]) is int
    assert type(example(share=1)["share"]) is int  # as it was given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2.5}, "count must be an integer; got 2.5. Round it."),
        ({"count": "3"}, "count must be an integer; got '3'. Leave out the quotes."),
        ({"count": True}, "count must be an integer; got True. Pass the number that you mean."),
        ({"count": None}, "count must be an integer; got None. Leave it out for the default."),
        ({"share": "x"}, "share must be a finite number; got 'x'. Pass a number."),
        ({"share": math.nan}, "share must be a finite number; got nan. Pass a finite one."),
        ({"flag": "yes"}, "flag must be True or False; got 'yes'. Write True or False."),
        ({"flag": 1}, "flag must be True or False; got 1. Write True or False."),
        ({"sizes": "3"}, "sizes must be a list of integers or None; got '3'. Put it in a list."),
        ({"sizes": [1, 2.5]}, "sizes must be a list of integers or None; got [1, 2.5]. Correct its values."),
        ({"pair": [1, 2, 3]}, "pair must be a list of 2 integers; got [1, 2, 3]. Correct its values."),
        ({"name": 3}, "name must be a string; got 3. Put quotes around it."),
        ({"module": "relu"}, "module must be a Module or None; got 'relu'. Pass one."),
    ],
)
def test_each_kind_in_its_own_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        example(**given)
    assert str(error.value) == message


def test_what_cannot_be_judged_passes() -> None:
    assert conform("x", "y", Any) == "y"
    assert example(call=print)["call"] is print
    assert inspect.signature(example).parameters["count"].annotation is int


def test_hyperparameters_stay_plain_data() -> None:
    module = DDCLReadoutModule(IdentityBackbone(4), DDCLReadout(4), Clustering(4), lr_prototypes=np.float64(0.1))
    assert type(module.hparams["lr_prototypes"]) is float


def test_integers_fit_into_64_bits_and_sizes_into_memory() -> None:
    with pytest.raises(ValueError, match=r"num_prototypes must be an integer; got 10{30}\. Pass 9223372036854775807"):
        PrototypeBank(10**30, 4)
    with pytest.raises(ValueError, match="must fit into memory; got num_prototypes = 1000000000000000, dim = 4"):
        PrototypeBank(10**15, 4)
    with pytest.raises(ValueError, match="must fit into memory; got num_prototypes = 1000000000000, dim = 10000000000"):
        PrototypeBank(10**12, 10**10)
