"""The seed of random choices that do not use torch's global generator."""

import os


def resolve_seed(seed: int | None) -> int:
    """``seed`` itself, or where it is None the one that ``seed_everything`` set last (42 if it never ran).

    Raises:
        ValueError: If the seed is negative.
    """
    value = int(os.environ.get("PL_GLOBAL_SEED", 42)) if seed is None else seed
    if value < 0:
        raise ValueError(f"seed must be >= 0, or None for that of seed_everything; got {value}.")
    return value
