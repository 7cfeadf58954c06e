"""The seed of random choices that do not use torch's global generator."""

import os

LARGEST_SEED = 2**32 - 1  # what NumPy's global generator and scikit-learn take


def check_seed(name: str, seed: int) -> None:
    """Raise a ValueError that names the argument unless every generator takes the seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{name} must be in [0, {LARGEST_SEED}]; got {seed}. Pass a number in that range.")


def resolve_seed(seed: int | None) -> int:
    """``seed`` itself, or where it is None the one that ``seed_everything`` set last (42 if it never ran).

    Raises:
        ValueError: If the seed is not in [0, 2**32).
    """
    value = int(os.environ.get("PL_GLOBAL_SEED", 42)) if seed is None else seed
    check_seed("seed", value)
    return value
