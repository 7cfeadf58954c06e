"""Semantic IDs as columns of a table, and the codebooks that they are of."""

from collections.abc import Mapping
from typing import cast

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ddcl_lightning.functional import disambiguate
from ddcl_lightning.nn.balanced_ids import LevelQuantizer
from ddcl_lightning.nn.quantizer_base import Quantizer

SEMANTIC_ID, DISAMBIGUATION = "semantic_id", "disambiguation"


def with_id_columns(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output of ``predict_step`` with a column for each code of a ``semantic_id`` ``(B, L)``; others as they are.

    The shares of each code in a sample, ``assignments``, say the same again and are left out. The column that tells
    items of one ID apart is filled in when all of them are known.
    """
    if SEMANTIC_ID not in outputs:
        return dict(outputs)
    rest = {name: value for name, value in outputs.items() if name not in (SEMANTIC_ID, "assignments")}
    ids = outputs[SEMANTIC_ID]
    codes = {f"code_{level + 1}": column for level, column in enumerate(ids.unbind(1))}
    return {**_before(rest, "index"), **codes, DISAMBIGUATION: torch.zeros_like(ids[:, 0]), **rest}


def fill_disambiguation(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the running number of each item among those of its ID, in the order of the rows."""
    if DISAMBIGUATION not in table:
        return table
    levels = sum(name.startswith("code_") for name in table.columns[: list(table.columns).index(DISAMBIGUATION)])
    ids = np.ascontiguousarray(table[[f"code_{level + 1}" for level in range(levels)]].to_numpy(np.int64))
    return table.assign(**{DISAMBIGUATION: disambiguate(torch.from_numpy(ids))[:, -1].numpy()})


def collision_note(table: pd.DataFrame) -> str:
    """Sentence on how many items share their ID, or nothing for a table without IDs."""
    if DISAMBIGUATION not in table:
        return ""
    numbers = table[DISAMBIGUATION].dropna()
    return (
        f" {int((numbers == 0).sum()):,} of {len(numbers):,} IDs are distinct; {DISAMBIGUATION} tells the others apart."
    )


def id_lines(metrics: Mapping[str, Tensor]) -> list[str]:
    """Lines on the semantic IDs of validation, as logged: on all items, and a table of the levels; none without IDs."""
    values = {name.removeprefix("val/"): float(value) for name, value in metrics.items() if name.startswith("val/")}
    if "distinct_ids" not in values:
        return []
    error = f"relative error {values['relative_error']:.4g}, " if "relative_error" in values else ""
    lines = [
        f"semantic IDs (val): {error}colliding items {values['collisions']:.4g}, distinct "
        f"{values['distinct_ids']:,.0f} of {values['items']:,.0f}, largest group {values['largest_group']:,.0f}",
        f"{'level':<8}{'usage':>12}{'perplexity':>12}{'given prefix':>14}",
    ]
    for level in range(1, sum(name.startswith("level") and name.endswith("_usage") for name in values) + 1):
        used, spread = values[f"level{level}_usage"], values[f"level{level}_perplexity"]
        given = values.get(f"level{level}_conditional_perplexity")
        lines.append(f"{level:<8}{used:>12.3f}{spread:>12.1f}" + (f"{given:>14.1f}" if given else f"{'-':>14}"))
    return lines


def residual_quantizer(module: pl.LightningModule) -> LevelQuantizer:
    """The outermost quantizer in a module that has levels of codes.

    Raises:
        ValueError: If there is none.
    """
    for child in module.modules():
        codebook = getattr(child, "codebook", None)
        if isinstance(child, Quantizer) and isinstance(codebook, Tensor) and hasattr(child, "num_levels"):
            return cast(LevelQuantizer, child)
    raise ValueError(f"codebooks are of a residual quantizer; {type(module).__name__} has none. Use a head with one.")


def _before(rest: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {name: rest.pop(name)} if name in rest else {}
