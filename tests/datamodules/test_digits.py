import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ddcl_lightning.datamodules import DigitsDataModule


def test_batches_hold_the_scaled_digits() -> None:
    data = DigitsDataModule()
    data.setup()
    assert (data.num_features, data.num_classes) == (64, 10)
    assert data.class_names[7] == "7"
    batch = next(iter(data.train_dataloader()))
    assert batch["x"].shape == (256, 64)
    assert batch["x"].dtype == torch.float32
    assert batch["y"].dtype == batch["index"].dtype == torch.int64
    images, digits = load_digits(return_X_y=True)
    assert torch.equal(batch["x"], torch.from_numpy(images).float()[batch["index"]] / 16)
    assert torch.equal(batch["y"], torch.from_numpy(digits)[batch["index"]])
    assert batch["x"].min() == 0
    assert batch["x"].max() == 1


def test_validation_runs_over_the_training_set_by_default() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.cat([batch["index"] for batch in loader]).equal(torch.arange(1797))


def test_split_keeps_the_shares_of_the_classes() -> None:
    data = DigitsDataModule(val_fraction=0.2)
    data.setup()
    held_out = torch.cat([batch["y"] for batch in data.val_dataloader()])
    train = torch.cat([batch["y"] for batch in data.train_dataloader()])
    assert len(held_out) + len(train) == 1797
    shares = held_out.bincount() / (held_out.bincount() + train.bincount())
    assert shares.sub(0.2).abs().max() < 0.005


def test_digits_as_images_are_the_same_pixels() -> None:
    flat, images = DigitsDataModule(), DigitsDataModule(as_images=True)
    for data in (flat, images):
        data.setup()
    first, second = (next(iter(data.predict_dataloader())) for data in (flat, images))
    assert second["x"].shape == (256, 1, 8, 8)
    assert torch.equal(first["x"], second["x"].flatten(1))
    for data in (flat, images):
        example = data.example(5)
        assert (example.shape, example.dtype) == ((8, 8), np.uint8)
        assert np.array_equal(example, np.round(load_digits().images[5] / 16 * 255))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer; got 2.5"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\); got 1.0"),
        ({"seed": -1}, r"seed must be in \[0, 4294967295\]; got -1"),
        ({"seed": 2**32}, "seed must be in"),
        ({"num_workers": 1025}, "num_workers must be at most 1024; got 1025"),
        ({"batch_size": 2**31}, "batch_size must be at most"),
        ({"eval_batch_size": 2**40}, "eval_batch_size must be at most"),
        ({"limit": 2**63 - 1}, "limit must be at most"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0; got -1"),
    ],
)
def test_digits_refuse_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)
