from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from ddcl_lightning.datamodules import DebrisDataModule
from ddcl_lightning.datamodules._orbits import (
    EARTH_RADIUS_KM,
    REGIMES,
    generate_objects,
    kepler_period_min,
    label_regimes,
    read_catalogue,
)
from ddcl_lightning.metrics.clustering_metrics import (
    adjusted_rand_index,
    count_matrix,
    hungarian_accuracy,
    normalized_mutual_info,
)


def whole(data: DebrisDataModule) -> dict[str, Tensor]:
    """Everything that prediction runs over, in order."""
    data.setup()
    batches = list(data.predict_dataloader())
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_batches_are_standardised_and_balanced() -> None:
    data = DebrisDataModule()
    rows = whole(data)
    assert (data.num_features, data.num_classes, data.class_names) == (6, 4, ("LEO", "MEO", "GEO", "HEO"))
    assert rows["x"].shape == (1600, 6)
    assert rows["x"].dtype == torch.float32
    assert rows["y"].bincount().tolist() == [400] * 4
    assert rows["index"].equal(torch.arange(1600))
    torch.testing.assert_close(rows["x"].mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows["x"].std(0, correction=0), torch.ones(6))
    raw = rows["x"] * data.feature_std + data.feature_mean
    np.testing.assert_allclose(raw, generate_objects(400, data.noise, seed=42)[0], rtol=1e-3, atol=1e-2)


def test_statistics_come_from_the_training_rows_alone() -> None:
    data = DebrisDataModule(val_fraction=0.25)
    data.setup()
    train = torch.cat([batch["x"] for batch in data.train_dataloader()])
    assert len(train) == 1200
    torch.testing.assert_close(train.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    held_out = torch.cat([batch["x"] for batch in data.val_dataloader()])
    assert held_out.mean(0).abs().max() > 1e-3


def test_seed_decides_the_objects() -> None:
    first, again, other = (whole(DebrisDataModule(num_per_class=10, seed=seed))["x"] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_objects_without_noise_are_physical_and_in_their_regime() -> None:
    features, labels = generate_objects(num_per_class=500, noise=0.0, seed=0)
    axis, eccentricity, inclination, node, rcs, period = features.T
    perigee, apogee = (axis * (1 + sign * eccentricity) - EARTH_RADIUS_KM for sign in (-1, 1))
    np.testing.assert_allclose(period, kepler_period_min(axis))
    assert perigee.min() > 0
    assert rcs.min() > 0
    assert 0 <= node.min() <= node.max() < 360
    regimes = label_regimes(perigee, apogee, eccentricity, inclination)
    assert np.array_equal(regimes, labels)


def test_orbital_periods_are_the_published_ones() -> None:
    # A sidereal day at the geostationary radius, half of one for Molniya, 92.6 minutes at 400 km.
    periods = kepler_period_min(np.array([42164.0, 26562.0, EARTH_RADIUS_KM + 400]))
    np.testing.assert_allclose(periods, [1436.07, 718.03, 92.56], rtol=1e-4)


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_noise_is_a_multiple_of_the_spread_of_each_feature(noise: float) -> None:
    truth, _ = generate_objects(num_per_class=5000, noise=0.0, seed=3)
    measured, _ = generate_objects(num_per_class=5000, noise=noise, seed=3)
    truth[:, 4], measured[:, 4] = np.log(truth[:, 4]), np.log(measured[:, 4])
    np.testing.assert_allclose((measured - truth).std(0) / truth.std(0), noise, rtol=0.03)


def test_default_noise_makes_k_means_fail_as_in_the_paper() -> None:
    rows = whole(DebrisDataModule())
    k_means = KMeans(n_clusters=4, n_init=10, random_state=42).fit(rows["x"].double().numpy())
    counts = count_matrix(torch.from_numpy(k_means.labels_).long(), rows["y"], 4, 4)
    # Table 3, "k-means (raw)". Measured here: 0.747, 0.751, 0.664; a few objects may change sides elsewhere.
    assert hungarian_accuracy(counts).item() == pytest.approx(0.756, abs=0.015)
    assert normalized_mutual_info(counts).item() == pytest.approx(0.751, abs=0.015)
    assert adjusted_rand_index(counts).item() == pytest.approx(0.667, abs=0.015)


@pytest.mark.parametrize(
    ("perigee", "apogee", "eccentricity", "inclination", "regime"),
    [
        (418, 423, 0.0004, 51.6, "LEO"),  # International Space Station
        (800, 2000, 0.08, 98.0, "LEO"),
        (800, 2001, 0.08, 98.0, "other"),  # leaves LEO
        (20180, 20190, 0.0005, 55.0, "MEO"),  # GPS
        (35780, 35793, 0.0002, 0.05, "GEO"),
        (35780, 35793, 0.0002, 15.1, "other"),  # inclined geosynchronous
        (36086, 36100, 0.0002, 5.0, "other"),  # graveyard
        (500, 39860, 0.74, 63.4, "HEO"),  # Molniya
        (250, 35786, 0.73, 7.0, "HEO"),  # geostationary transfer
        (500, 20000, 0.59, 63.4, "other"),  # transfer to MEO
    ],
)
def test_regimes_of_known_orbits(
    perigee: float, apogee: float, eccentricity: float, inclination: float, regime: str
) -> None:
    arguments = (np.array([float(value)]) for value in (perigee, apogee, eccentricity, inclination))
    assert (*REGIMES, "other")[label_regimes(*arguments)[0]] == regime


def table() -> pd.DataFrame:
    """One object per regime twice over, one of none; ISS-like, GPS-like, GEO, Molniya, graveyard."""
    rows = [
        (6798.0, 0.0004, 51.6, 10.0, 1.0, 92.6, 418.0, 423.0),
        (26560.0, 0.0005, 55.0, 20.0, 2.0, 718.0, 20180.0, 20190.0),
        (42164.0, 0.0002, 0.05, 30.0, 10.0, 1436.0, 35780.0, 35793.0),
        (26560.0, 0.74, 63.4, 40.0, 8.0, 718.0, 500.0, 39860.0),
        (42471.0, 0.0002, 5.0, 50.0, 4.0, 1452.0, 36086.0, 36100.0),
    ]
    columns = "semi_major_axis_km eccentricity inclination_deg raan_deg rcs_m2 period_min perigee_km apogee_km"
    return pd.concat([pd.DataFrame(rows, columns=columns.split())] * 2, ignore_index=True)


def save(frame: pd.DataFrame, folder: Path) -> Path:
    path = folder / "catalogue.csv.gz"
    frame.to_csv(path, index=False)
    return path


def test_catalogue_is_labelled_and_the_rest_dropped_or_kept(tmp_path: Path) -> None:
    path = save(table().assign(name="unused"), tmp_path)
    data = DebrisDataModule(catalogue=path)
    assert whole(data)["y"].tolist() == [0, 1, 2, 3] * 2
    assert data.num_classes == 4
    data = DebrisDataModule(catalogue=str(path), other="keep")
    assert whole(data)["y"].tolist() == [0, 1, 2, 3, 4] * 2
    assert data.num_classes == 5
    assert data.class_names[4] == "other"


def test_missing_rcs_is_imputed_or_dropped(tmp_path: Path) -> None:
    frame = table()
    frame.loc[[0, 5], "rcs_m2"] = [np.nan, 0.0]
    path = save(frame, tmp_path)
    imputed = DebrisDataModule(catalogue=path)
    rows = whole(imputed)
    assert imputed.num_missing_rcs == 2
    assert len(rows["x"]) == 8
    raw = rows["x"][:, 4] * imputed.feature_std[4] + imputed.feature_mean[4]
    assert raw[0].item() == pytest.approx(8.0)  # median of 2, 2, 8, 8, 10, 10; torch takes the lower of the middle two
    dropped = DebrisDataModule(catalogue=path, missing_rcs="drop")
    assert whole(dropped)["y"].tolist() == [1, 2, 3, 1, 2, 3]
    assert dropped.num_missing_rcs == 2


def test_invalid_elements_are_left_out_and_counted(tmp_path: Path) -> None:
    frame = table().astype({"inclination_deg": object})
    frame.loc[0, "eccentricity"] = 1.2
    frame.loc[1, "semi_major_axis_km"] = np.nan
    frame.loc[2, "inclination_deg"] = "n/a"
    data = DebrisDataModule(catalogue=save(frame, tmp_path))
    assert whole(data)["y"].tolist() == [3, 0, 1, 2, 3]
    assert data.num_invalid == 3


def test_examples_are_the_values_before_scaling(tmp_path: Path) -> None:
    frame = table()
    frame.loc[0, "rcs_m2"] = np.nan
    data = DebrisDataModule(catalogue=save(frame, tmp_path))
    data.setup()
    assert data.example(1) == (
        "semi_major_axis_km 2.656e+04, eccentricity 0.0005, inclination_deg 55, raan_deg 20, rcs_m2 2, period_min 718"
    )
    assert "rcs_m2 nan" in data.example(0)


def test_constant_feature_is_not_divided_by_zero(tmp_path: Path) -> None:
    rows = whole(DebrisDataModule(catalogue=save(table().assign(raan_deg=7.0), tmp_path)))
    assert not rows["x"][:, 3].any()


def test_unusable_catalogues_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"catalogue must be an existing .* got .*nowhere\.csv"):
        read_catalogue(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="lacks rcs_m2, apogee_km"):
        read_catalogue(save(table().drop(columns=["rcs_m2", "apogee_km"]), tmp_path))
    with pytest.raises(ValueError, match="at least one row of valid elements"):
        read_catalogue(save(table().assign(eccentricity=np.nan), tmp_path))
    with pytest.raises(ValueError, match=r"object with an RCS in one of LEO, MEO, GEO, HEO"):
        DebrisDataModule(catalogue=save(table().assign(rcs_m2=np.nan), tmp_path)).setup()
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(ValueError, match=r"must be a \.csv or \.csv\.gz table"):
        read_catalogue(empty)
    fake = tmp_path / "fake.csv.gz"
    fake.write_text("not compressed")
    with pytest.raises(ValueError, match=r"must be a \.csv or \.csv\.gz table"):
        read_catalogue(fake)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_per_class": 0}, "num_per_class must be an integer of at least 1; got 0"),
        ({"noise": -0.1}, "noise must be finite and at least 0; got -0.1"),
        ({"noise": float("nan")}, "noise must be a finite number; got nan"),
        ({"other": "ignore"}, "other must be 'drop' or 'keep'; got 'ignore'"),
        ({"missing_rcs": "zero"}, "missing_rcs must be 'impute' or 'drop'; got 'zero'"),
    ],
)
def test_debris_refuses_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DebrisDataModule(**arguments)


@pytest.mark.shared_data
def test_the_real_catalogue_has_its_counted_classes(orbital_catalogue: Path) -> None:
    data = DebrisDataModule(catalogue=orbital_catalogue)
    rows = whole(data)
    assert rows["x"].isfinite().all()
    # Counted once with an independent script over the definitions; LEO dominates, as it does in orbit.
    assert rows["y"].bincount().tolist() == [12581, 499, 670, 1015]
    assert data.num_invalid == 0
    assert data.num_missing_rcs == 256
    kept = whole(DebrisDataModule(catalogue=orbital_catalogue, other="keep", missing_rcs="drop"))
    assert len(kept["y"]) == 16475 - 261
    assert kept["y"].max() == 4


@pytest.mark.shared_data
def test_synthetic_rcs_follows_the_real_catalogue(orbital_catalogue: Path) -> None:
    real = read_catalogue(orbital_catalogue)
    synthetic, labels = generate_objects(num_per_class=5000, noise=0.0, seed=0)
    molniya = (real.labels != 3) | (abs(real.features[:, 2] - 64) <= 4)
    for index in range(len(REGIMES)):
        log_real = np.log(real.features[molniya & (real.labels == index), 4])
        log_synthetic = np.log(synthetic[labels == index, 4])
        assert np.nanmedian(log_real) == pytest.approx(np.median(log_synthetic), abs=0.1)
        assert np.nanstd(log_real) == pytest.approx(log_synthetic.std(), abs=0.1)
