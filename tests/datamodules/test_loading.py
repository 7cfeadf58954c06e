"""The order of training batches: a function of seed and epoch, and unchanged by a restart anywhere."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from ddcl_lightning.datamodules._loading import EpochSampler, ResumableDataLoader, Rows, as_is
from ddcl_lightning.datamodules._tensors import Features, TensorDataModule
from tests.processes import succeed_in_processes

ROWS, BATCH_SIZE, EPOCHS = 22, 6, 3
BATCHES = 4  # per epoch, the last one of 4 rows

pytestmark = [
    # In-memory data needs no workers, whatever the number of cores.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The resumed runs here save nothing.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    # Lightning 2.6 itself, under torch 2.14.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class Numbers(TensorDataModule):
    feature_names = ("value",)
    class_names = ("even", "odd")

    def __init__(self, seed: int = 42, num_workers: int = 0, val_fraction: float = 0.0) -> None:
        super().__init__(batch_size=BATCH_SIZE, val_fraction=val_fraction, seed=seed, num_workers=num_workers)

    def tensors(self) -> tuple[Tensor, Tensor]:
        rows = torch.arange(ROWS)
        return rows.unsqueeze(1).float(), rows % 2


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch["x"]).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Recorder(Callback):
    """Keeps (epoch, rows) of every training batch, and writes them out per process."""

    def __init__(self, folder: Path | None = None) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.folder = folder

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((trainer.current_epoch, batch["index"].tolist()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.folder:
            torch.save(self.batches, self.folder / f"{trainer.global_rank}.pt")


def fit(
    callbacks: list[Callback],
    num_workers: int = 0,
    checkpoint: Path | None = None,
    data: TensorDataModule | None = None,
    folder: Path | None = None,
    **options: Any,
) -> list[tuple[int, list[int]]]:
    recorder = Recorder(folder)
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "limit_val_batches": 0} | options
    trainer = pl.Trainer(
        callbacks=[recorder, *callbacks],
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Model(), datamodule=data or Numbers(num_workers=num_workers), ckpt_path=checkpoint)
    return recorder.batches


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    options = {"every_n_train_steps": 1} | options
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def rows_of(batches: list[tuple[int, list[int]]], epoch: int) -> list[int]:
    return [row for e, rows in batches if e == epoch for row in rows]


def test_each_epoch_is_a_new_order_of_all_rows_that_a_rerun_repeats() -> None:
    batches = fit([])
    orders = [rows_of(batches, epoch) for epoch in range(EPOCHS)]
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batches == fit([])
    assert batches != fit([], data=Numbers(seed=43))


@pytest.mark.parametrize("limit", [{"max_epochs": EPOCHS}, {"max_steps": EPOCHS * BATCHES, "max_epochs": -1}])
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_resuming_after_any_step_continues_the_uninterrupted_run(
    tmp_path: Path, limit: dict[str, int], limit_val_batches: float
) -> None:
    options: dict[str, Any] = {**limit, "limit_val_batches": limit_val_batches, "num_sanity_val_steps": 0}
    whole = fit([every_step(tmp_path)], **options)
    assert len(whole) == EPOCHS * BATCHES
    for step in range(1, EPOCHS * BATCHES):
        resumed = fit([], checkpoint=tmp_path / f"step={step}.ckpt", **options)
        assert [rows for _, rows in resumed] == [rows for _, rows in whole[step:]], f"after step {step}"


@pytest.mark.parametrize("step", [1, BATCHES, BATCHES + 2])
def test_workers_that_fetch_ahead_change_nothing(tmp_path: Path, step: int) -> None:
    whole = fit([every_step(tmp_path)], num_workers=2)
    assert whole == fit([])
    resumed = fit([], num_workers=2, checkpoint=tmp_path / f"step={step}.ckpt")
    assert [rows for _, rows in resumed] == [rows for _, rows in whole[step:]]


@pytest.mark.parametrize(
    "options",
    [{"every_n_train_steps": 0, "every_n_epochs": 1, "save_on_train_epoch_end": end} for end in (True, False)],
)
def test_resuming_between_epochs_starts_the_next_one_in_full(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = fit([every_step(tmp_path, **options)], limit_val_batches=1.0, num_sanity_val_steps=0)
    resumed = fit([], checkpoint=tmp_path / f"step={BATCHES}.ckpt", limit_val_batches=1.0, num_sanity_val_steps=0)
    assert [rows for _, rows in resumed] == [rows for _, rows in whole[BATCHES:]]


def test_resuming_with_truncated_epochs(tmp_path: Path) -> None:
    whole = fit([every_step(tmp_path)], limit_train_batches=3)
    for step in range(1, EPOCHS * 3):
        resumed = fit([], checkpoint=tmp_path / f"step={step}.ckpt", limit_train_batches=3)
        assert [rows for _, rows in resumed] == [rows for _, rows in whole[step:]], f"after step {step}"


def test_overfitting_one_batch_still_works() -> None:
    # The order is fixed there, as Lightning announces.
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        batches = fit([], overfit_batches=2)
    assert [rows for _, rows in batches] == [list(range(6)), list(range(6, 12))] * EPOCHS


def loader(
    seed: int = 0, rows: int = ROWS, batch_size: int = BATCH_SIZE, processes: int = 1, rank: int = 0
) -> ResumableDataLoader:
    index = torch.arange(rows)
    data = Rows(Features(index.unsqueeze(1)), index % 2, index)
    sampler = EpochSampler(data, num_replicas=processes, rank=rank, seed=seed)
    return ResumableDataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=as_is)


def drain(batches: ResumableDataLoader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def test_state_is_used_once_and_only_for_its_epoch() -> None:
    first = loader()
    iterator = iter(first)
    consumed = [next(iterator)["index"].tolist() for _ in range(2)]
    state = first.state_dict()
    whole = consumed + [batch["index"].tolist() for batch in iterator]

    second = loader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert len(second) == BATCHES
    assert drain(second) == whole[2:]
    assert drain(second) == whole

    third = loader()
    third.load_state_dict(state)
    assert isinstance(third.sampler, EpochSampler)
    third.sampler.set_epoch(1)
    assert sorted(row for rows in drain(third) for row in rows) == list(range(ROWS))


def test_any_other_data_set_is_sampled_by_its_places() -> None:
    sampler = EpochSampler(range(5), num_replicas=1, rank=0, seed=0)  # type: ignore[arg-type]
    sampler.set_epoch(3)
    assert sorted(sampler) == [*range(5)]


def test_every_process_resumes_its_own_share() -> None:
    whole = [drain(loader(processes=2, rank=rank)) for rank in range(2)]
    assert sorted(row for batches in whole for rows in batches for row in rows) == list(range(ROWS))
    first = loader(processes=2, rank=0)
    next(iter(first))
    for rank in range(2):  # the checkpoint of the first process serves all
        resumed = loader(processes=2, rank=rank)
        resumed.load_state_dict(first.state_dict())
        assert drain(resumed) == whole[rank][1:]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"rows": ROWS + 1}, {"batch_size": BATCH_SIZE - 1}, {"processes": 2}])
def test_another_order_is_refused_in_the_middle_of_an_epoch(changed: dict[str, int]) -> None:
    first = loader()
    next(iter(first))
    second = loader(**changed)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="must keep the number of rows, batch_size"):
        next(iter(second))


def test_loaders_over_held_out_rows() -> None:
    data = Numbers(val_fraction=0.25)
    data.setup()
    train = sorted(row for batch in data.train_dataloader() for row in batch["index"].tolist())
    held_out = [row for batch in data.val_dataloader() for row in batch["index"].tolist()]
    assert len(held_out) == 6
    assert sorted(train + held_out) == list(range(ROWS))
    assert held_out == [row for batch in data.test_dataloader() for row in batch["index"].tolist()]
    predicted = [row for batch in data.predict_dataloader() for row in batch["index"].tolist()]
    assert predicted == list(range(ROWS))
    assert data.num_classes == 2
    assert data.num_features == 1


def test_loaders_before_setup_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Numbers must be set up .* call setup"):
        Numbers().train_dataloader()


@pytest.mark.slow
def test_two_processes_share_every_epoch(tmp_path: Path) -> None:
    succeed_in_processes(tmp_path, partial(fit, [], folder=tmp_path, strategy="ddp", devices=2))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for epoch in range(EPOCHS):
        own, other = rows_of(first, epoch), rows_of(second, epoch)
        assert sorted(own + other) == list(range(ROWS))
    assert rows_of(first, 0) != rows_of(first, 1)


def grouped(lengths: Tensor, epoch: int = 0, processes: int = 1, rank: int = 0, batch_size: int = 8) -> list[int]:
    sampler = EpochSampler(
        range(len(lengths)),  # type: ignore[arg-type]
        num_replicas=processes,
        rank=rank,
        seed=0,
        batch_size=batch_size,
        lengths=lengths,
    )
    sampler.set_epoch(epoch)
    return list(sampler)


def test_lengths_put_similar_rows_into_one_batch_and_lose_none() -> None:
    lengths = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0))
    epochs = [grouped(lengths, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert sorted(order) == list(range(1003))
        batches = lengths[torch.tensor(order[:1000])].view(-1, 8).float()
        assert batches.std(1).mean() < 0.1 * lengths.float().std()
        # Short and long batches come in no order.
        means = batches.mean(1)
        assert abs(float(torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1])) < 0.3
    # A batch of one epoch is not a batch of the next.
    first, second = ({frozenset(order[i : i + 8]) for i in range(0, 1000, 8)} for order in epochs)
    assert len(first & second) < 5


def test_processes_group_their_own_rows_and_step_through_similar_lengths() -> None:
    lengths = torch.randint(1, 500, (1600,), generator=torch.Generator().manual_seed(0))
    first, second = (torch.tensor(grouped(lengths, processes=2, rank=rank)) for rank in range(2))
    assert sorted(torch.cat([first, second]).tolist()) == list(range(1600))
    means = torch.stack([lengths[rows].view(-1, 8).float().mean(1) for rows in (first, second)])
    assert float(torch.corrcoef(means)[0, 1]) > 0.95  # nobody waits for the other's longer batch


def test_lengths_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one length per row, shape \(5,\); got \(4,\)"):
        EpochSampler(range(5), num_replicas=1, rank=0, seed=0, lengths=torch.ones(4))  # type: ignore[arg-type]
