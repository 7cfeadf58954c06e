"""Compare runs of all recipes in several processes with runs in one, on the same joint batches.

Two epochs with SGD (where a recipe moves its codes by ``TokenNormalized``, with that), of the real digits or debris, or
of the tests' tiny files where a recipe would fetch data and encoder. The difference is that of the final weights and
buffers: of every tensor the largest difference over its largest value.

    python benchmarks/processes.py
"""

import sys
import tempfile
from pathlib import Path

from _study import ROOT, Case, Config, Options, Study
from _tables import Results, Run, Table, extreme, same

sys.path.insert(0, str(ROOT))

from ddcl_lightning.recipes import recipe_paths
from tests.equal_runs import CODES, SGD, ends, relative_differences
from tests.recipe_words import LOCAL, local_words

CASES = {
    # Fewer rows in a joint batch of tiny files.
    name: Case(name, {"recipe": name, "processes": 2, "joint_batch": 24 if name in LOCAL else 240})
    for name in sorted(recipe_paths())
}


def run(config: Config, seed: int, options: Options) -> Run:
    """Differences between the results of the recipe with one and several processes."""
    recipe = config["recipe"]
    codes = [] if "TokenNormalized" in recipe_paths()[recipe].read_text(encoding="utf-8") else CODES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = [word for word in local_words(recipe, folder) if "batch_size" not in word]
        words = [f"--config={recipe}", *local, *codes, *SGD]
        sizes = (1, config["processes"])
        (alone,), (first, *others) = (ends(folder, words, config["joint_batch"], size) for size in sizes)
    apart = relative_differences(alone.state, first.state)
    tensor = max(apart, key=apart.__getitem__)
    between = max(max(relative_differences(first.state, other.state).values()) for other in others)
    return {"largest": apart[tensor], "of": tensor, "between_processes": between, "tensors": len(apart)}


def table(results: Results) -> Table:
    columns = {
        "largest relative difference": extreme(max, "largest", ".1e"),
        "of": same(lambda run: f"`{run['of']}`"),
        "between the processes": extreme(max, "between_processes", "g"),
    }
    return results.table("recipe", CASES, columns)


STUDY = Study("processes", CASES, run, {"recipes": table}, quick={"digits": CASES["digits"]})

if __name__ == "__main__":
    STUDY.main(__doc__)
