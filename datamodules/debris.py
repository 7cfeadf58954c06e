"""Space debris in four orbital regimes: generated, or read from a catalogue (section 7.2 of the paper)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddcl_lightning._utils.arguments import typed
from ddcl_lightning.datamodules._orbits import (
    FEATURE_NAMES,
    OTHER,
    RCS_COLUMN,
    REGIMES,
    Array,
    Labels,
    generate_objects,
    read_catalogue,
)
from ddcl_lightning.datamodules._origin import Origin
from ddcl_lightning.datamodules._partition import EvaluateOn
from ddcl_lightning.datamodules._splits import check_at_least, check_choice
from ddcl_lightning.datamodules._tensors import TensorDataModule


class DebrisDataModule(TensorDataModule):
    """Objects in low (LEO), medium (MEO), geostationary (GEO) and highly elliptic (HEO, Molniya) Earth orbit.

    Six features (eq. 18): semi-major axis (km), eccentricity, inclination and right ascension of the
    ascending node (degrees), radar cross-section (RCS, square metres) and period (minutes), each standardized
    with the mean and standard deviation of the training rows. Unless ``catalogue`` is given the objects are
    synthetic. The populations, the error model and the definitions of the regimes stand, with their sources,
    in ``ddcl_lightning.datamodules._orbits``.

    The paper gives neither the unit of its noise nor the populations; the default ``noise`` is the one at which
    k-means scores what the paper says of it, see ``docs/measurements.md`` ("Orbital debris").

    Args:
        batch_size: Rows per training batch and process, at least 1.
        num_per_class: Synthetic objects per regime, at least 1. Unused with ``catalogue``.
        noise: Standard deviation of the Gaussian measurement error of a synthetic feature, as a multiple of
            the standard deviation of the error-free feature over all regimes, at least 0; of its logarithm
            for the RCS. Unused with ``catalogue``.
        catalogue: A .csv or .csv.gz file of real objects with the columns ``semi_major_axis_km``,
            ``eccentricity``, ``inclination_deg``, ``raan_deg``, ``rcs_m2``, ``period_min``, ``perigee_km``
            and ``apogee_km``. Rows with a missing or impossible orbital element are left out; the others keep their
            number (``index``).
        other: What to do with objects of a catalogue that are in none of the four regimes: "drop" them, or
            "keep" them as a fifth class.
        missing_rcs: What to do with objects of a catalogue without an RCS: "impute" the median RCS of the
            training rows, or "drop" them.
        eval_batch_size: Rows per batch of all other loaders; by default ``batch_size``.
        val_fraction: Part of each class that is held out for validation and test, in [0, 1). With 0 they run over
            the training set.
        evaluate_on: See :class:`~ddcl_lightning.datamodules.SplitDataModule`, as for all the arguments around it.
        limit: Train on at most this many objects, every class keeping its share.
        seed: Seed of the synthetic objects, the split and the training order, in [0, 2**32); by default that of
            ``seed_everything``.
        num_workers: Worker processes per loader; 0 is fastest for tensors in memory.

    Attributes:
        feature_mean: Mean of each raw feature over the training rows, ``(6,)``; set by :meth:`setup`.
        feature_std: Standard deviation, ``(6,)``; 1 for a constant feature.
        num_invalid: Rows of the catalogue left out for an invalid orbital element.
        num_missing_rcs: Rows of the catalogue without an RCS, imputed or dropped.

    Raises:
        ValueError: If an argument is out of its range, or the catalogue cannot be used.
        FileNotFoundError: If the catalogue does not exist.
    """

    feature_names = FEATURE_NAMES

    @typed
    def __init__(
        self,
        batch_size: int = 256,
        num_per_class: int = 400,
        noise: float = 0.5,
        catalogue: str | Path | None = None,
        other: Literal["drop", "keep"] = "drop",
        missing_rcs: Literal["impute", "drop"] = "impute",
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        evaluate_on: EvaluateOn = "auto",
        limit: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            evaluate_on=evaluate_on,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )
        check_at_least("num_per_class", num_per_class, 1)
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise must be finite and at least 0; got {noise}. Use 0 for exact features.")
        check_choice("other", other, ("drop", "keep"))
        check_choice("missing_rcs", missing_rcs, ("impute", "drop"))
        self.num_per_class = num_per_class
        self.noise = noise
        self.catalogue = catalogue
        self.other = other
        self.missing_rcs = missing_rcs
        self.num_invalid = self.num_missing_rcs = 0
        self._origin: Origin | None = None
        self.feature_mean = torch.zeros(self.num_features, dtype=torch.float64)
        self.feature_std = torch.ones(self.num_features, dtype=torch.float64)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the regimes; "other" is one of them where it is kept."""
        keeps_other = self.catalogue is not None and self.other == "keep"
        return (*REGIMES, "other") if keeps_other else REGIMES

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Raw features ``(N, 6)`` and regimes ``(N,)``; a missing RCS is NaN here."""
        if self.catalogue is None:
            features, labels = generate_objects(self.num_per_class, self.noise, self.seed)
        else:
            features, labels = self._load_catalogue(self.catalogue)
        return torch.from_numpy(features), torch.from_numpy(labels)

    def origin(self) -> Origin | None:
        """The catalogue; generated objects have none."""
        return self._origin

    def scale(self, x: Tensor, train_rows: Tensor) -> Tensor:
        """Fill in a missing RCS and standardize, both with statistics of the training rows."""
        x = x.clone()
        rcs = x[:, RCS_COLUMN]
        rcs[rcs.isnan()] = rcs[train_rows].nanmedian()
        self.feature_mean = x[train_rows].mean(dim=0)
        spread = x[train_rows].std(dim=0, correction=0)
        self.feature_std = torch.where(spread > 0, spread, 1.0)
        return (x - self.feature_mean) / self.feature_std

    def _load_catalogue(self, path: str | Path) -> tuple[Array, Labels]:
        features, labels, self.num_invalid, table, rows = read_catalogue(path)
        other = (labels == OTHER) & (self.other == "drop")
        kept = ~other
        without_rcs = np.isnan(features[:, RCS_COLUMN])
        self.num_missing_rcs = int((kept & without_rcs).sum())
        if self.missing_rcs == "drop":
            kept = kept & ~without_rcs
        if not (kept & ~without_rcs).any():
            raise ValueError(
                f"catalogue must hold at least one object with an RCS in one of {', '.join(REGIMES)}; {path} "
                "holds none. Check the units of its columns, or keep the rest with other='keep'."
            )
        dropped = {
            "invalid elements": np.setdiff1d(np.arange(len(table)), rows),
            "in no regime": rows[other],
            "no radar cross-section": rows[~other & ~kept],
        }
        self._origin = Origin(
            torch.from_numpy(rows[kept]),
            {str(name): table[name].to_numpy()[rows[kept]].tolist() for name in table},
            {reason: numbers.tolist() for reason, numbers in dropped.items()},
        )
        return features[kept], labels[kept]
