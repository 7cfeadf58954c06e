"""Settings that a checkpoint of another model overrules: those that were asked for are refused, the others named."""

from typing import Any

import pytest

from ddcl_lightning.cli.overruled import overruled_settings, refusal

DDCL, VQ = "ddcl_lightning.DDCLReadout", "ddcl_lightning.VQPooling"
STORED: dict[str, Any] = {
    "head.class_path": DDCL,
    "head.init_args.num_prototypes": 10,
    "head.init_args.temperature.value": 0.1,
    "head.init_args.temperature.unit": "critical",
    "rho": 0.0,
}


def refused(given: dict[str, Any], *words: str) -> dict[str, bool]:
    """Whether each setting that differs is refused, by its name."""
    return {s.name: s.refused for s in overruled_settings({**STORED, **given}, STORED, words)}


@pytest.mark.parametrize(
    ("given", "words", "expected"),
    [
        ({}, ["--model.rho=0"], {}),
        ({"rho": 0.5}, [], {"model.rho": False}),
        ({"rho": 0.5}, ["--model.rho", "0.5"], {"model.rho": True}),
        ({"rho": 0.5}, ["--model", "{rho: 0.5}"], {"model.rho": True}),
        ({"rho": 0.5}, ["--model", "{lr_task: 0.5}"], {"model.rho": False}),
        ({"head.init_args.num_prototypes": 12}, ["--model.rho=0"], {"model.head.init_args.num_prototypes": False}),
        (
            {"head.init_args.num_prototypes": 12},
            ["--model.head.num_prototypes=12"],
            {"model.head.init_args.num_prototypes": True},
        ),
        (
            {"head.init_args.num_prototypes": 12},
            ["--model.head.init_args", "{num_prototypes: 12}"],
            {"model.head.init_args.num_prototypes": True},
        ),
        (
            {"head.init_args.num_prototypes": 12},
            ["--model.head", DDCL],
            {"model.head.init_args.num_prototypes": False},
        ),
        (
            {"head.init_args.temperature.value": 0.3},
            ["--model.head.temperature", "0.3"],
            {"model.head.init_args.temperature.value": True},
        ),
        # Of another class the arguments say nothing, and a class differs wherever it comes from.
        ({"head.class_path": VQ, "head.init_args.num_prototypes": 12}, [], {"model.head.class_path": True}),
        # One class by another path, and no class at all.
        ({"head.class_path": "ddcl_lightning.heads.DDCLReadout"}, [], {}),
        ({"head.class_path": None}, [], {"model.head.class_path": False}),
    ],
)
def test_what_was_asked_for_is_refused_and_the_rest_named(
    given: dict[str, Any], words: list[str], expected: dict[str, bool]
) -> None:
    assert refused(given, *words) == expected


def test_the_sentence_names_options_and_both_values() -> None:
    settings = overruled_settings({**STORED, "head.class_path": VQ, "rho": 0.5}, STORED, ["--model.rho=0.5"])
    assert refusal(settings, "a.ckpt") == (
        "ckpt_path must be of the model that the config and the options give; 'a.ckpt' was trained with model.head = "
        "DDCLReadout (got VQPooling), model.rho = 0.0 (got 0.5). Give what it was trained with, leave the option out, "
        "or name another checkpoint."
    )
