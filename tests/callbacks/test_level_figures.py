import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Project, fit

from ddcl_lightning import Clustering, ConvBackbone, DDCLReadout, DDCLReadoutModule
from ddcl_lightning.backbones import PatchBackbone
from ddcl_lightning.callbacks import LevelFigures
from ddcl_lightning.callbacks import level_figures as figures_module
from ddcl_lightning.functional import nearest_prototype
from ddcl_lightning.heads import CLSPooling, HierarchicalReadout

IMAGES = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
DATA = torch.utils.data.DataLoader([{"x": image} for image in IMAGES], batch_size=6)


def hierarchy(**kwargs):
    torch.manual_seed(0)
    head = HierarchicalReadout([5, 3], tokens=["all", "joined"], num_tokens=4, **kwargs)
    return DDCLReadoutModule(PatchBackbone(patch_size=2), head, Clustering(), rho=0.0)


def run(callback, folder, module=None, data=DATA, **kwargs):
    import lightning.pytorch as pl
    from toys import QUIET

    kwargs = {**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, "default_root_dir": folder, **kwargs}
    trainer = pl.Trainer(callbacks=[callback], **kwargs)
    trainer.fit(module or hierarchy(), data, data)
    return trainer


def names(folder):
    return sorted(path.name for path in folder.glob("**/*.png"))


def test_both_levels_are_drawn_at_every_interval_and_at_the_end(tmp_path):
    run(LevelFigures(every_n_epochs=2), tmp_path, max_epochs=3)
    levels = [f"prototypes_head.levels.{level}.bank" for level in (0, 1)]
    assert names(tmp_path / "figures") == [f"{name}-step={step:06d}.png" for name in levels for step in (4, 6)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("figures/*.png"))


def test_tensorboard_gets_them_instead(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    run(LevelFigures(), tmp_path, logger=logger, log_every_n_steps=1)
    assert names(tmp_path) == []
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
    assert sorted(tags) == [f"prototypes/head.levels.{level}.bank" for level in (0, 1)]


def test_a_prototype_is_the_mean_of_what_it_is_nearest_to(tmp_path, monkeypatch):
    drawn = {}

    def keep(atoms, counts, low, high, title, **kwargs):
        drawn[title] = (atoms, counts)
        return drawing(atoms, counts, low, high, title, **kwargs)

    drawing = figures_module.draw_atoms
    monkeypatch.setattr(figures_module, "draw_atoms", keep)
    module = hierarchy(num_heads=[2, 1])
    run(LevelFigures(), tmp_path, module)
    assert sorted(drawn) == [f"head.levels.0.bank/head{head}" for head in (0, 1)] + ["head.levels.1.bank"]

    first_batch = {"x": IMAGES[:6]}
    pieces = module.backbone.pieces(first_batch).flatten(0, 1)
    level, above = module.head.eval().levels
    read = level(module.backbone(first_batch).values)
    codes = nearest_prototype(level.bank.split_heads(read.embedded)[0], level.bank.prototypes)
    atoms, counts = drawn["head.levels.0.bank/head1"]
    assert atoms.shape == (5, 1, 2, 2)
    assert counts.tolist() == torch.bincount(codes[1], minlength=5).tolist()
    code = int(codes[1, 0])
    torch.testing.assert_close(atoms[code], pieces[codes[1] == code].mean(0))

    codes = nearest_prototype(above.bank.split_heads(read.tokens.flatten(1))[0], above.bank.prototypes)[0]
    atoms, _ = drawn["head.levels.1.bank"]
    assert atoms.shape == (3, 1, 4, 4)
    torch.testing.assert_close(atoms[codes[0]], IMAGES[:6][codes == codes[0]].mean(0))


def test_it_leaves_the_run_as_it_was(tmp_path):
    states = []
    for callbacks in ([], [LevelFigures()]):
        module = hierarchy()
        run(callbacks[0] if callbacks else NOTHING, tmp_path, module, max_epochs=3)
        assert module.training
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


NOTHING = Callback()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        # A feature map's cells are no pieces of the image that anybody knows.
        (lambda: DDCLReadoutModule(ConvBackbone(1, 4, (4,)), DDCLReadout(3), Clustering()), "head.attention.bank"),
        (lambda: DDCLReadoutModule(ConvBackbone(1, 4, (4,)), CLSPooling(), Nothing()), None),
    ],
)
def test_what_cannot_be_shown_is_named_once_and_left_out(module, reason, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(LevelFigures(every_n_epochs=1), tmp_path, module(), max_epochs=3)
    assert names(tmp_path) == []
    said = [record.message for record in caplog.records if record.message.startswith("LevelFigures leaves out")]
    assert len(said) == (reason is not None)
    assert all(reason in message for message in said)


class Nothing(Clustering):
    """A task for a head without prototypes."""

    unsupervised = False

    def build(self, head):
        pass

    def losses(self, readout, batch):
        return {"loss": readout.pooled.square().mean()}

    def metrics(self):
        return {}

    def update_metrics(self, metrics, readout, batch):
        pass


def test_level_figures_refuse_an_interval_of_zero_and_other_modules(tmp_path):
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1; got 0"):
        LevelFigures(every_n_epochs=0)
    with pytest.raises(ValueError, match="LevelFigures needs a DDCLReadoutModule; got Project"):
        fit(Project(), LevelFigures())
