"""The feature cache: the same tokens as without it, whatever happens to the process, the disk or the weights."""

import copy
import logging
import os
import pickle
import re
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ddcl_lightning import Classification, DDCLReadout, DDCLReadoutModule, Tokens
from ddcl_lightning.backbones import feature_cache
from ddcl_lightning.backbones.feature_cache import INDEX_BYTES, FeatureCache, content_key
from tests.backbones.cache_filler import Letters, batches, fill, text
from tests.processes import LIMIT, Running, fork_server, start_processes, succeed_in_processes
from tests.tiny import quiet_trainer

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def texts_of(first: int, last: int) -> list[str]:
    return [text(i) for i in range(first, last)]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/segment-*"))


def assert_exact(folder: Path, first: int, last: int) -> Letters:
    """The cache holds these texts and returns for each what the encoder makes of it."""
    backbone, reference = Letters(str(folder)), Letters()
    batch = {"text": texts_of(first, last)}
    values, mask = backbone(batch)
    expected, expected_mask = reference(batch)
    assert mask is not None
    assert torch.equal(mask, expected_mask)
    assert torch.equal(values[mask], expected[mask].half().float())
    return backbone


# The store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_returns_what_was_stored_before_and_after_writing(tmp_path: Path, dtype: Any) -> None:
    cache = FeatureCache(tmp_path, {"a": 1}, 4, dtype)
    keys = [content_key(bytes([i])) for i in range(3)]
    for number, key in enumerate(keys):
        rounded = cache.add(key, ROWS[: number + 1])
        assert rounded.dtype == dtype
    for _ in range(2):
        for number, key in enumerate(keys):
            rows = cache.get(key)
            assert rows is not None
            assert np.array_equal(rows, ROWS[: number + 1].astype(dtype))
        assert len(cache) == 3
        assert cache.get(content_key(b"?")) is None
        assert content_key(b"?") not in cache
        cache.flush()
    again = FeatureCache(tmp_path, {"a": 1}, 4, dtype)
    assert len(again) == 3
    assert all(key in again for key in keys)
    assert len(FeatureCache(tmp_path, {"a": 2}, 4, dtype)) == 0
    assert '"a": 1' in (again.path / "meta.json").read_text()


def test_a_key_is_kept_once(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {}, 4)
    for _ in range(3):
        cache.add(b"k" * 16, ROWS)
        cache.flush()
    assert len(segments(tmp_path)) == 1


def test_large_buffers_are_written_without_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SEGMENT_SAMPLES", 2)
    cache = FeatureCache(tmp_path, {}, 4)
    cache.add(b"1" * 16, ROWS)
    assert not segments(tmp_path)
    cache.add(b"2" * 16, ROWS)
    assert len(segments(tmp_path)) == 1
    monkeypatch.setattr(feature_cache, "SEGMENT_BYTES", ROWS.nbytes // 2)
    cache.add(b"3" * 16, ROWS)
    assert len(segments(tmp_path)) == 2


def test_a_dropped_cache_writes_what_waits(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {}, 4)
    cache.add(b"k" * 16, ROWS)
    del cache
    assert len(FeatureCache(tmp_path, {}, 4)) == 1


def test_keys_do_not_run_into_each_other() -> None:
    assert content_key(b"ab", b"c") != content_key(b"a", b"bc")
    assert len(content_key()) == 16


def test_feature_cache_refuses_arrays_that_it_could_not_return(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {}, 4)
    with pytest.raises(ValueError, match=r"shape \(T, 4\); got \(3, 5\)"):
        cache.add(b"k" * 16, np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"features of up to 1e\+05 do not fit.*use cache_dtype='float32'"):
        cache.add(b"k" * 16, np.full((1, 4), 1e5, np.float32))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"cache_dir '.*file' cannot be written.*Choose another folder"):
        FeatureCache(file, {}, 4)


# Damage ---------------------------------------------------------------------------------------------


def cut_values(segment: Path) -> None:
    file = segment / "values.npy"
    file.write_bytes(file.read_bytes()[:-8])


def change_values(segment: Path) -> None:
    file = segment / "values.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x55
    file.write_bytes(bytes(data))


def cut_index(segment: Path) -> None:
    file = segment / "index.npz"
    file.write_bytes(file.read_bytes()[:-30])


def empty_index(segment: Path) -> None:
    (segment / "index.npz").write_bytes(b"")


def lose_values(segment: Path) -> None:
    (segment / "values.npy").unlink()


@pytest.mark.parametrize("damage", [cut_values, change_values, cut_index, empty_index, lose_values])
def test_a_damaged_segment_is_computed_again(tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SEGMENT_SAMPLES", 6)
    Letters(str(tmp_path)).fill_cache(batches(0, 18), progress=False)
    assert len(segments(tmp_path)) == 3
    damage(segments(tmp_path)[1])
    with pytest.warns(UserWarning, match="cached features in .* are damaged .*: deleted and computed again"):
        backbone = assert_exact(tmp_path, 0, 18)
    backbone.fill_cache(batches(0, 18), progress=False)  # of a changed value the samples read before it had been whole
    assert len(set(backbone.encoded)) == len(backbone.encoded)
    assert len(backbone.encoded) == 6
    assert assert_exact(tmp_path, 0, 18).encoded == []


def test_a_segment_that_may_not_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, or another user's rights: what is there may be whole."""
    Letters(str(tmp_path)).fill_cache(batches(0, 6), progress=False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.np, "fromfile", refuse)
        with pytest.warns(UserWarning, match="cannot be read .*Permission denied.*: computed again"):
            assert_exact(tmp_path, 0, 6)
    assert len(segments(tmp_path)) == 2  # the old one, and what was computed in its place
    assert assert_exact(tmp_path, 0, 6).encoded == []


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SEGMENT_SAMPLES", 6)
    written, write = [], feature_cache._write

    def full(path: Path, save: Any) -> None:
        if len(written) >= 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, save)

    monkeypatch.setattr(feature_cache, "_write", full)
    backbone = Letters(str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left.*the run goes on") as warned:
        backbone.fill_cache(batches(0, 40), progress=False)
    assert len(warned) == 1
    assert len(backbone.encoded) < 40  # what cannot be kept is not computed ahead
    batch = {"text": texts_of(0, 40)}
    values, mask = backbone(batch)
    expected, _ = Letters()(batch)
    assert mask is not None
    assert torch.equal(values[mask], expected[mask].half().float())
    assert len(segments(tmp_path)) == 1
    assert not list(tmp_path.glob("*/tmp-*"))


# Other processes ------------------------------------------------------------------------------------


def filler(folder: Path, *arguments: Any) -> tuple[Running, Connection]:
    """A process that is about to fill a cache, and what it is talked to by."""
    own, other = fork_server().Pipe()
    (running,) = start_processes(folder, fill, str(folder), *arguments, other)
    wait_for(own, "ready")
    return running, own


def wait_for(connection: Connection, word: str) -> None:
    assert connection.poll(LIMIT)
    assert connection.recv() == word


@pytest.mark.slow
@pytest.mark.parametrize("where", ["hang_in_encoder", "hang_in_write"])
def test_a_killed_fill_goes_on_where_it_stopped(tmp_path: Path, where: str) -> None:
    running, connection = filler(tmp_path, 0, 40, where)
    connection.send("start")
    wait_for(connection, "ready to be killed")
    running.process.kill()  # SIGKILL: nothing is cleaned up
    running.process.join(LIMIT)
    unfinished = list(tmp_path.glob("*/tmp-*"))
    assert len(unfinished) == (where == "hang_in_write")

    kept = len(Letters(str(tmp_path))._open_cache())
    assert kept == 6 * len(segments(tmp_path))
    assert 0 < kept < 40
    backbone = Letters(str(tmp_path))
    assert backbone.fill_cache(batches(0, 40), progress=False) == 40 - kept
    assert len(set(backbone.encoded)) == len(backbone.encoded) == 40 - kept
    assert assert_exact(tmp_path, 0, 40).encoded == []
    assert sum(len(np.load(segment / "index.npz")["keys"]) for segment in segments(tmp_path)) == 40

    assert list(tmp_path.glob("*/tmp-*")) == unfinished  # it might belong to a process that still writes
    for entry in unfinished:
        os.utime(entry, (time.time() - 7200,) * 2)
    Letters(str(tmp_path))._open_cache()
    assert not list(tmp_path.glob("*/tmp-*"))


@pytest.mark.slow
def test_processes_fill_the_same_cache_at_once(tmp_path: Path) -> None:
    ranges = [(0, 60), (20, 80)]
    fillers = [filler(tmp_path, *bounds, "") for bounds in ranges]
    backbone = Letters(str(tmp_path))
    backbone._open_cache()
    for _, connection in fillers:
        connection.send("start")
    for running, _ in fillers:
        running.process.join(LIMIT)
        assert running.outcome().code == 0, running.outcome()
    backbone._open_cache().rescan()
    assert backbone.fill_cache(batches(0, 80), progress=False) == 0
    assert assert_exact(tmp_path, 0, 80).encoded == []


# Backbones ------------------------------------------------------------------------------------------


def test_the_encoder_sees_each_sample_once(tmp_path: Path) -> None:
    backbone = Letters(str(tmp_path))
    order = [3, 1, 3, 0, 2]
    batch = {"text": [text(i) for i in order]}
    first = backbone(batch)
    assert sorted(backbone.encoded) == texts_of(0, 4)
    second = backbone(batch)
    assert len(backbone.encoded) == 4
    assert torch.equal(first.values, second.values)  # rounded the first time too
    backbone._open_cache().flush()
    third = Letters(str(tmp_path))(batch)
    assert torch.equal(first.values, third.values)
    assert torch.equal(first.mask, third.mask)
    exact = Letters(str(tmp_path), "float32")(batch)  # a cache of its own
    expected = Letters()(batch)
    assert torch.equal(exact.values[exact.mask], expected.values[expected.mask])
    torch.testing.assert_close(first.values[first.mask], expected.values[expected.mask], rtol=1e-3, atol=1e-3)


def test_a_fill_encodes_long_texts_together(tmp_path: Path) -> None:
    backbone = Letters(str(tmp_path))
    assert backbone.fill_cache([*batches(0, 16), *batches(0, 4)], progress=False) == 16
    lengths = [len(sample) for sample in backbone.encoded]
    assert lengths == sorted(lengths, reverse=True)
    assert backbone.fill_cache(batches(0, 18), progress=False) == 2
    with pytest.raises(ValueError, match=r"fill_cache needs a place.*cache_dir"):
        Letters().fill_cache([])


def test_an_interrupted_fill_keeps_what_is_whole(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield from batches(0, 20)
        raise KeyboardInterrupt

    backbone = Letters(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        backbone.fill_cache(interrupted(), progress=False)
    assert len(backbone.encoded) == 16  # a pool of four batches
    assert Letters(str(tmp_path)).fill_cache(batches(0, 20), progress=False) == 4


def test_other_weights_have_another_cache(tmp_path: Path) -> None:
    backbone, other = Letters(str(tmp_path)), Letters(str(tmp_path))
    other.encoder.weight.data += 1
    for each in (backbone, other):
        each(batches(0, 4)[0])
    assert len(other.encoded) == 4
    assert len(list(tmp_path.iterdir())) == 2
    backbone.load_state_dict(other.state_dict())  # closes the cache of the weights that are gone
    backbone.encoded.clear()
    other._open_cache().flush()
    features = backbone(batches(0, 4)[0])
    assert backbone.encoded == []
    assert torch.equal(features.values, other(batches(0, 4)[0]).values)


def test_autocast_does_not_reach_the_cache(tmp_path: Path) -> None:
    class Linear(Letters):
        def encode(self, samples: Any) -> Tokens:
            values, mask = super().encode(samples)
            return Tokens(values @ torch.full((4, 4), 0.1), mask)

    with torch.autocast("cpu", torch.bfloat16):
        values = Linear(str(tmp_path / "a"), "float32")(batches(0, 4)[0]).values
    assert torch.equal(values, Linear(str(tmp_path / "b"), "float32")(batches(0, 4)[0]).values)


def test_copies_open_the_cache_for_themselves(tmp_path: Path) -> None:
    backbone = Letters(str(tmp_path))
    backbone(batches(0, 4)[0])
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert twin._cache is None
        twin(batches(4, 8)[0])
    assert backbone._cache is not None


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_refuses_a_cache_of_what_trains(tmp_path: Path, unfreeze: Any) -> None:
    with pytest.raises(ValueError, match=r"cache_dir needs a frozen encoder.*set unfreeze=0"):
        Letters(str(tmp_path), unfreeze=unfreeze)


def test_a_full_cache_keeps_what_fits_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [f"{number:04d}" for number in range(100)]
    batches = [{"text": words[start : start + 5]} for start in range(0, 100, 5)]
    limit = 60 * (4 * 4 * 2 + INDEX_BYTES)  # of four letters, four numbers each
    backbone = Letters(str(tmp_path), cache_gb=limit / 2**30)
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match=r"is full, at .* GiB: .* Raise cache_gb"):
        backbone.prepare(batches)
    assert re.search(r"Tokens of 100 samples take about .* GiB .*: about 60% of them are kept", caplog.text)
    size = sum(file.stat().st_size for file in tmp_path.rglob("values.npy"))
    assert 0.8 * 60 * 32 < size < 60 * 32 + 1024
    reference = Letters()
    for batch in batches:
        torch.testing.assert_close(backbone.train()(batch).values, reference(batch).values, rtol=1e-2, atol=1e-3)
    encoded = len(backbone.encoded)
    backbone(batches[0])
    assert len(backbone.encoded) == encoded  # kept
    backbone(batches[-1])
    assert len(backbone.encoded) == encoded + 5  # not kept
    # Another run finds it full.
    again = Letters(str(tmp_path), cache_gb=limit / 2**30)
    with pytest.warns(UserWarning, match="is full"):
        again(batches[-1])
    assert sum(file.stat().st_size for file in tmp_path.rglob("values.npy")) == size


def test_a_cache_may_take_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert FeatureCache(tmp_path, {}, 4).max_bytes == 500
    with pytest.raises(ValueError, match=r"cache_gb must be > 0; got 0\. Leave out cache_dir"):
        Letters(str(tmp_path), cache_gb=0)


def test_refuses_another_dtype(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_dtype must be one of .*; got 'int8'"):
        Letters(str(tmp_path), "int8")


# Training -------------------------------------------------------------------------------------------


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"text": text(i), "y": i % 2, "index": i} for i in range(first, last)]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"text": [item["text"] for item in items], "y": torch.tensor([item["y"] for item in items])}


def loader(first: int, last: int, **kwargs: Any) -> "DataLoader[Any]":
    return DataLoader(rows(first, last), batch_size=8, collate_fn=collate, **kwargs)  # type: ignore[arg-type]


def module_of(backbone: Letters) -> DDCLReadoutModule:
    torch.manual_seed(0)
    return DDCLReadoutModule(backbone, DDCLReadout(3), Classification(2))


def test_training_fills_the_cache_and_then_reads_it(tmp_path: Path) -> None:
    backbone = Letters(str(tmp_path))
    module = module_of(backbone)
    torch.manual_seed(0)
    quiet_trainer(max_epochs=3).fit(module, loader(0, 40, shuffle=True), loader(40, 52))
    assert sorted(backbone.encoded) == sorted(texts_of(0, 52))
    lengths = [len(sample) for sample in backbone.encoded[:32]]
    assert lengths == sorted(lengths, reverse=True)  # before training, not as the batches came
    del module, backbone._cache
    again = Letters(str(tmp_path))
    twin = module_of(again)
    torch.manual_seed(0)
    quiet_trainer(max_epochs=3).fit(twin, loader(0, 40, shuffle=True), loader(40, 52))
    assert again.encoded == []
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_first_epoch_sees_the_rounded_tokens(tmp_path: Path) -> None:
    """A run that fills the cache, one that finds it full and one that computes as it goes on train alike."""

    def train(folder: Path, prepare: bool) -> dict[str, torch.Tensor]:
        module = module_of(Letters(str(folder)))
        if not prepare:
            module.backbone.prepare = lambda batches: None  # type: ignore[method-assign]
        torch.manual_seed(0)
        quiet_trainer(max_epochs=2).fit(module, loader(0, 40, shuffle=True))
        return module.state_dict()

    runs = [train(tmp_path / "a", True), train(tmp_path / "a", True), train(tmp_path / "b", False)]
    for run in runs[1:]:
        assert all(torch.equal(value, runs[0][name]) for name, value in run.items())


def test_augmented_samples_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddcl_lightning.backbones.pretrained.SEGMENT_SAMPLES", 16)
    fresh = iter(range(10_000))

    def augment(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(items)
        return {**batch, "text": [sample + str(next(fresh)) for sample in batch["text"]]}

    data = DataLoader(rows(0, 40), batch_size=8, collate_fn=augment)  # type: ignore[arg-type]
    with pytest.warns(
        UserWarning, match="24 of 24 training samples were not in the cache.*random augmentation"
    ) as caught:
        quiet_trainer(max_epochs=3).fit(module_of(Letters(str(tmp_path))), data)
    assert sum("augmentation" in str(warning.message) for warning in caught) == 1


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        number = 0
        while True:
            yield {"text": text(number % 30), "y": number % 2}
            number += 1


def test_a_stream_without_end_is_cached_as_it_comes(tmp_path: Path) -> None:
    backbone = Letters(str(tmp_path))
    data = DataLoader(Stream(), batch_size=10, collate_fn=collate)
    quiet_trainer(max_steps=5).fit(module_of(backbone), data)
    assert backbone.encoded == texts_of(0, 30)


def test_a_resumed_run_keeps_its_place_in_the_data(tmp_path: Path) -> None:
    """Filling the cache reads the loaders, which must not disturb their restored state."""
    from ddcl_lightning.datamodules._loading import EpochSampler, ResumableDataLoader

    class SaveAtSeven(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")

    class Numbered(list[dict[str, Any]]):
        def __getitem__(self, number: Any) -> Any:  # the sampler counts on over the epochs
            return super().__getitem__(number % len(self))

    def data() -> Any:
        items = Numbered(rows(0, 40))
        sampler = EpochSampler(items, num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
        return ResumableDataLoader(items, batch_size=8, collate_fn=collate, sampler=sampler)  # type: ignore[arg-type]

    def train(cache: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        module = module_of(Letters(str(tmp_path / cache)))
        trainer = quiet_trainer(max_epochs=3, callbacks=[] if kwargs else [SaveAtSeven()])
        trainer.fit(module, data(), weights_only=True, **kwargs)
        return module.state_dict()

    whole = train("full")
    for cache in ("full", "empty"):
        resumed = train(cache, ckpt_path=str(tmp_path / "seven.ckpt"))
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def ddp(folder: Path) -> None:
    module = module_of(Letters(str(folder)))
    quiet_trainer(max_epochs=3, devices=2, strategy="ddp").fit(module, loader(0, 40, shuffle=True))


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    succeed_in_processes(tmp_path, ddp, tmp_path)
    # Each process encoded its half, and later found the other half, which the shuffled epochs brought it.
    assert sum(len(np.load(segment / "index.npz")["keys"]) for segment in segments(tmp_path)) == 40
    assert assert_exact(tmp_path, 0, 40).encoded == []


def test_a_folder_that_somebody_deletes_is_made_again(tmp_path: Path) -> None:
    backbone = Letters(str(tmp_path))
    backbone.fill_cache(batches(0, 8), progress=False)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("segment-")) == ["meta.json"]
    shutil.rmtree(folder)
    expected = Letters()({"text": texts_of(0, 12)})
    features = backbone({"text": texts_of(0, 12)})
    assert torch.equal(features.values[features.mask], expected.values[expected.mask].half().float())
    backbone._open_cache().flush()
    assert assert_exact(tmp_path, 0, 12).encoded == []
