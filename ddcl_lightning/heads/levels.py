"""Arguments of a stack of levels: one value for each, and what each may read of the one below."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from ddcl_lightning._utils.old_names import renamed_value

LevelTokens = Literal["all", "first", "mean", "idf_mean", "idf_inputs", "joined"]
IDF_READS = ("idf_mean", "idf_inputs")


def per_level(num_prototypes: Sequence[int], name: str, value: Any) -> list[Any]:
    """One value for each level.

    Raises:
        ValueError: If there is a list of another length than ``num_prototypes``.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * len(num_prototypes)
    if len(value) != len(num_prototypes):
        raise ValueError(
            f"{name} must be one value for all levels or a list with one per level, {len(num_prototypes)} as in "
            f"num_prototypes = {list(num_prototypes)}; got {list(value)}. Give one per level."
        )
    return list(value)


def check_value(name: str, values: Sequence[Any], allowed: Sequence[str]) -> None:
    """Raise a ValueError unless all values of an argument are allowed."""
    for value in values:
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {tuple(allowed)}; got {value!r}.{renamed_value(str(value), str(allowed))}"
            )


def check_reads(reads: Sequence[LevelTokens], num_tokens: int | None) -> None:
    """Raise a ValueError unless each level can read what it shall of the one below.

    Args:
        reads: What each level reads.
        num_tokens: T of the samples, for levels that read tokens side by side.
    """
    check_value("tokens", reads, get_args(LevelTokens))
    if reads[0] in IDF_READS:
        raise ValueError(
            f"tokens of the first level must not be {reads[0]!r}, which weighs tokens by the prototypes of the level "
            "below. Use 'all' there."
        )
    if ("joined" in reads) != (num_tokens is not None):
        raise ValueError(
            f"num_tokens belongs to tokens 'joined', which needs it; got num_tokens = {num_tokens} with tokens "
            f"{list(reads)}. Give both, or leave num_tokens out."
        )
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, the tokens of a sample; got {num_tokens}. Pass 1 or more.")
    single = next((level for level, of_level in enumerate(reads) if of_level != "all"), len(reads))
    for of_level in reads[single + 1 :]:
        if of_level in ("joined", *IDF_READS):
            raise ValueError(
                f"tokens must not be {of_level!r} above a level that reads one vector per sample; got {list(reads)}. "
                "Use 'all' there."
            )
