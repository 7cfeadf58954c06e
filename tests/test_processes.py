"""What is promised of several processes: nothing hangs, and they see what one process sees."""

import re
from pathlib import Path

import pytest

from ddcl_lightning.cli import main
from ddcl_lightning.recipes import recipe_paths
from tests.processes import run_processes
from tests.recipe_words import local_words

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def fit(folder: str, words: list[str], devices: int = 2) -> None:
    main(
        [
            "fit",
            *words,
            "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}",
            f"--trainer.default_root_dir={folder}",
        ]
    )


@pytest.mark.parametrize("name", sorted(recipe_paths()))
def test_recipe_in_two_processes_ends_with_its_table(name: str, tmp_path: Path) -> None:
    words = [f"--config={name}", *local_words(name, tmp_path), "--trainer.max_epochs=2", "--trainer.strategy=ddp"]
    first, second = run_processes(tmp_path, fit, str(tmp_path), words)
    assert (first.code, second.code) == (0, 0), first.output[-3000:] + second.output[-3000:]
    assert "left out a part" not in first.output
    assert "sync_dist" not in first.output + second.output
    assert re.search(r"^prototypes \(last step\)", first.output, re.MULTILINE)
    assert "prototypes (last step)" not in second.output
