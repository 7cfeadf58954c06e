import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Masked, Project, fit

from ddcl_lightning.callbacks import (
    CollapseWarning,
    KMeansInitialization,
    PrototypeFigures,
    TemperatureAnnealing,
)
from ddcl_lightning.callbacks import prototype_figures as figures_module

KINDS = ("bank", "signals", "usage")


def names(folder):
    return sorted(path.name for path in folder.glob("**/*.png"))


def expected(*steps, bank="layer.bank"):
    return sorted(f"{kind}_{bank}-step={step:06d}.png" for kind in KINDS for step in steps)


def test_files_without_a_logger_at_every_interval_and_at_the_end(tmp_path):
    fit(Project(), PrototypeFigures(every_n_epochs=2), max_epochs=5, default_root_dir=tmp_path)
    assert names(tmp_path / "figures") == expected(12, 24, 30)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("figures/*.png"))


def test_the_course_of_what_is_watched_is_drawn_too(tmp_path):
    watch = CollapseWarning(every_n_batches=1)
    callbacks = [KMeansInitialization(progress=False), TemperatureAnnealing(), watch, PrototypeFigures()]
    fit(Project(num_heads=2), *callbacks, max_epochs=1, default_root_dir=tmp_path)
    drawn = [name for name in names(tmp_path) if name.startswith("health")]
    assert drawn == [f"health_layer.bank_head{head}-step=000006.png" for head in (0, 1)]
    assert sorted(watch.courses()) == ["layer.bank/head0", "layer.bank/head1"]


def test_the_end_is_drawn_once_and_however_it_comes(tmp_path):
    fit(Masked(), PrototypeFigures(every_n_epochs=2), max_epochs=2, default_root_dir=tmp_path / "a")
    assert names(tmp_path) == expected(12)
    fit(Project(), PrototypeFigures(every_n_epochs=9), max_steps=8, max_epochs=9, default_root_dir=tmp_path / "b")
    assert names(tmp_path / "b") == expected(8)


def test_every_head_has_its_figures(tmp_path):
    fit(Project(num_heads=2), PrototypeFigures(), max_epochs=1, default_root_dir=tmp_path)
    heads = [expected(6, bank=f"layer.bank_head{head}") for head in (0, 1)]
    assert names(tmp_path) == sorted(heads[0] + heads[1])


def test_tensorboard_gets_them_instead(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Project(), PrototypeFigures(), max_epochs=1, logger=logger, log_every_n_steps=1)
    assert names(tmp_path) == []
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"{kind}/layer.bank" for kind in KINDS]


def test_another_logger_gets_files_in_its_folder(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Project(), PrototypeFigures(), max_epochs=1, logger=logger, log_every_n_steps=1)
    assert names(tmp_path) == expected(6)
    assert (tmp_path / "lightning_logs/version_0/figures").is_dir()


def test_curves_survive_a_restart_and_not_another_run(tmp_path, monkeypatch):
    drawn = []
    real = figures_module.draw_history
    monkeypatch.setattr(
        figures_module,
        "draw_history",
        lambda points, title: drawn.append([point["step"] for point in points]) or real(points, title),
    )
    kwargs = {"default_root_dir": tmp_path}
    fit(Project(), PrototypeFigures(every_n_batches=3), max_epochs=1, **kwargs).save_checkpoint(tmp_path / "one.ckpt")
    callback = PrototypeFigures(every_n_batches=3)
    fit(Project(), callback, max_epochs=2, ckpt_path=tmp_path / "one.ckpt", **kwargs)
    fit(Project(), callback, max_epochs=1, **kwargs)
    assert drawn == [[1, 4], [1, 4, 7, 10], [1, 4]]


def test_curves_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_module, "MAX_POINTS", 5)
    callback = PrototypeFigures(every_n_batches=1)
    fit(Project(), callback, max_epochs=4, default_root_dir=tmp_path)
    steps = [point["step"] for point in callback.state_dict()["history"]["layer.bank"]]
    assert len(steps) <= 5
    assert steps[0] == 1
    assert steps == sorted(steps)


def test_prototype_figures_refuse_an_interval_of_zero():
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1"):
        PrototypeFigures(every_n_epochs=0)
