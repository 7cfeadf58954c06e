"""Compare runs of all recipes in several processes with runs in one, on the same joint batches.

Two epochs with SGD (where a recipe moves its codes by ``TokenNormalized``, with that), of the real digits or debris, or
of the tests' tiny files where a recipe would fetch data and encoder. The difference is that of the final weights and
buffers: of every tensor the largest difference over its largest value.

    python benchmarks/processes.py --processes 2
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import ROOT, options, save

sys.path.insert(0, str(ROOT))

from ddcl_lightning.recipes import recipe_paths
from tests.equal_runs import CODES, SGD, ends, relative_differences
from tests.recipe_words import LOCAL, local_words


def joint_batch(recipe: str) -> int:
    """Rows in a joint batch: fewer of tiny files."""
    return 24 if recipe in LOCAL else 240


def compare(recipe: str, processes: int, folder: Path) -> dict[str, Any]:
    """How far the ends of that recipe are apart."""
    folder.mkdir()
    codes = [] if "TokenNormalized" in recipe_paths()[recipe].read_text(encoding="utf-8") else CODES
    local = [word for word in local_words(recipe, folder) if "batch_size" not in word]
    words = [f"--config={recipe}", *local, *codes, *SGD]
    rows = joint_batch(recipe)
    (alone,), (first, *others) = (ends(folder, words, rows, number) for number in (1, processes))
    apart = relative_differences(alone.state, first.state)
    worst = max(apart, key=lambda key: apart[key])
    between = max(max(relative_differences(first.state, other.state).values()) for other in others)
    return {"largest": apart[worst], "of": worst, "between processes": between, "tensors": len(apart)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row per recipe, in Markdown."""
    rows = ["| recipe | largest relative difference | of | between processes |", "|---|---|---|---|"]
    for name, found in results.items():
        rows.append(f"| {name} | {found['largest']:.1e} | `{found['of']}` | {found['between processes']:.1e} |")
    return "\n".join(rows)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="to compare with one")
    parser.add_argument("--recipes", nargs="+", default=sorted(recipe_paths()), choices=sorted(recipe_paths()))
    given = parser.parse_args()
    names, results = (["digits"] if given.quick else given.recipes), {}
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            results[name] = compare(name, given.processes, Path(root) / name)
            print(name, results[name], flush=True)
    print(table(results))
    save(given.output, "processes", {"processes": given.processes, "recipes": results})


if __name__ == "__main__":
    main()
