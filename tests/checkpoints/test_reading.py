"""A file that is no checkpoint is refused with a way out that is one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ddcl_lightning.checkpoints.reading import begins_anew, read_checkpoint


def whole(**changes: Any) -> dict[str, Any]:
    """What a checkpoint holds at least, with changes."""
    state: dict[str, Any] = {
        "state_dict": {"weight": torch.randn(100, 100)},
        "pytorch-lightning_version": "2.6.6",
        "epoch": 1,
        "global_step": 2,
        "loops": {"fit_loop": {}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "lr_schedulers": [],
    }
    return {**state, **changes}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def test_the_checkpoint_that_is_named_beside_a_damaged_one_is_whole(tmp_path: Path) -> None:
    files = {
        "good": whole(),
        "weights": {name: value for name, value in whole().items() if name != "optimizer_states"},
        "nan": whole(state_dict={"weight": torch.full((3,), torch.nan)}),
        "step": whole(global_step=-1),
        "flipped": whole(),
        "asked": whole(),
    }
    for age, (name, state) in enumerate(files.items()):
        torch.save(state, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (age, age))
    for name in ("flipped", "asked"):
        flip(tmp_path / f"{name}.ckpt")
    for to_resume, expected in ((True, "good"), (False, "weights")):
        with pytest.raises(ValueError, match=rf"is damaged: .* Beside it lies '\S+{expected}\.ckpt'\.$"):
            read_checkpoint(tmp_path / "asked.ckpt", to_resume)
    for name in ("good", "weights"):
        (tmp_path / f"{name}.ckpt").unlink()
    with pytest.raises(ValueError, match="Take one that `ddcl fit` wrote"):
        read_checkpoint(tmp_path / "asked.ckpt")


def test_what_a_file_lacks_is_said() -> None:
    assert begins_anew({"hyper_parameters": {"rho": 0}, "callbacks": {"ExactResume": {}}}) == []
    assert len(begins_anew({"callbacks": {}})) == 2
