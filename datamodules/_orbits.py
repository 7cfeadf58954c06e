"""Orbital regimes: a generator of synthetic objects, and the labelling of a real catalogue.

Definitions of the regimes for :func:`label_regimes`, altitudes above the Earth's surface:

- LEO: apogee up to 2,000 km (IADC Space Debris Mitigation Guidelines, IADC-02-01, protected region A).
- GEO: perigee and apogee within 200 km of 35,786 km, inclination up to 15 degrees (IADC-02-01, protected
  region B, whose 15 degrees of latitude an orbit stays within if its inclination does).
- HEO: eccentricity above 0.25 (Space-Track's basic definition) and apogee above 31,570 km, the upper edge of
  MEO in ESA's Annual Space Environment Report. Holds Molniya orbits and geostationary transfer orbits.
- MEO: between LEO and GEO, perigee above 2,000 km and apogee below 35,586 km (N. L. Johnson, "Medium Earth
  Orbits", IAC-10-A6.4.1), eccentricity up to 0.25 (Space-Track).
- other: the rest, for instance inclined geosynchronous and disposal orbits.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

FEATURE_NAMES = (
    "semi_major_axis_km",
    "eccentricity",
    "inclination_deg",
    "raan_deg",
    "rcs_m2",
    "period_min",
)
REGIMES = ("LEO", "MEO", "GEO", "HEO")
OTHER = len(REGIMES)

EARTH_RADIUS_KM = 6378.137  # equatorial, WGS 84
EARTH_MU_KM3_S2 = 398600.4418  # gravitational parameter, WGS 84
RCS_COLUMN = FEATURE_NAMES.index("rcs_m2")


class Range(NamedTuple):
    """Bounds of a uniform distribution."""

    low: float
    high: float


class Regime(NamedTuple):
    """Noise-free population of a regime.

    Attributes:
        semi_major_axis_km: Range of the semi-major axis.
        eccentricity: Range of the eccentricity.
        inclination_deg: Range of the inclination.
        rcs_median_m2: Median of the log-normal radar cross-section.
        rcs_log_std: Standard deviation of its natural logarithm.
    """

    semi_major_axis_km: Range
    eccentricity: Range
    inclination_deg: Range
    rcs_median_m2: float
    rcs_log_std: float


def _altitudes(low: float, high: float) -> Range:
    return Range(EARTH_RADIUS_KM + low, EARTH_RADIUS_KM + high)


# Every noise-free object is in its regime by label_regimes. RCS: median and standard deviation of the
# logarithm in the catalogue of April 2017 under the same labels; HEO: inclinations of 60 to 68 degrees alone.
POPULATIONS = (
    # Drag clears lower orbits within weeks. Inclinations from Cape Canaveral's latitude to sun-synchronous.
    Regime(_altitudes(300, 1900), Range(0.0, 0.01), Range(28.0, 100.0), 0.022, 2.26),
    # Navigation shells: GLONASS (19,100 km, 64.8 degrees), GPS (20,200 km, 55), Galileo (23,222 km, 56).
    Regime(_altitudes(19000, 23300), Range(0.0, 0.02), Range(50.0, 65.0), 2.2, 1.86),
    # Around the geostationary radius of 42,164 km; objects without control drift up to 15 degrees.
    Regime(Range(42164 - 100, 42164 + 100), Range(0.0, 0.002), Range(0.0, 15.0), 11.6, 1.91),
    # Molniya: half a sidereal day, near the inclination of 63.4 degrees at which the apogee stays in place.
    Regime(Range(26600 - 500, 26600 + 500), Range(0.6, 0.75), Range(61.0, 66.0), 7.0, 1.41),
)


def kepler_period_min(semi_major_axis_km: Array) -> Array:
    """Period of a two-body orbit in minutes, from its semi-major axis in km."""
    seconds: Array = 2 * np.pi * np.sqrt(semi_major_axis_km**3 / EARTH_MU_KM3_S2)
    return seconds / 60


def generate_objects(num_per_class: int, noise: float, seed: int) -> tuple[Array, Labels]:
    """Draw synthetic objects of :data:`POPULATIONS` and measure them with error.

    True elements are uniform in the ranges of their regime, the ascending node in [0, 360) degrees, the radar
    cross-section (RCS) log-normal, the period Kepler's. Each measured feature is the true one plus an
    independent Gaussian error whose standard deviation is ``noise`` times that of the true feature over the
    whole population. The error of the RCS is added to its logarithm, as errors of a radar are relative.
    Measured values are estimates: they are not cut to their physical range, and a measured period no longer
    follows from the measured axis.

    Args:
        num_per_class: Objects per regime.
        noise: Error in units of the standard deviation of each true feature, at least 0.
        seed: Seed of the draw.

    Returns:
        Features ``(4 * num_per_class, 6)`` in the order and units of :data:`FEATURE_NAMES`, and the regimes
        as indices into :data:`REGIMES`.
    """
    generator = np.random.default_rng(seed)
    populations = []
    for regime in POPULATIONS:
        axis, eccentricity, inclination = (generator.uniform(*bounds, num_per_class) for bounds in regime[:3])
        node = generator.uniform(0, 360, num_per_class)
        log_rcs = generator.normal(np.log(regime.rcs_median_m2), regime.rcs_log_std, num_per_class)
        period = kepler_period_min(axis)
        populations.append(np.column_stack([axis, eccentricity, inclination, node, log_rcs, period]))
    truth = np.concatenate(populations)
    measured = truth + noise * truth.std(axis=0) * generator.standard_normal(truth.shape)
    measured[:, RCS_COLUMN] = np.exp(measured[:, RCS_COLUMN])
    return measured, np.repeat(np.arange(len(POPULATIONS)), num_per_class)


def label_regimes(perigee_km: Array, apogee_km: Array, eccentricity: Array, inclination_deg: Array) -> Labels:
    """Regime of each orbit by the definitions at the head of this module, which exclude one another.

    Args:
        perigee_km: Altitude of the perigee, ``(N,)``.
        apogee_km: Altitude of the apogee, ``(N,)``.
        eccentricity: ``(N,)`` in [0, 1).
        inclination_deg: ``(N,)`` in [0, 180].

    Returns:
        Indices into :data:`REGIMES`, ``(N,)``; :data:`OTHER` for orbits of none.
    """
    near_geo = (abs(perigee_km - 35786) <= 200) & (abs(apogee_km - 35786) <= 200)
    leo = apogee_km <= 2000
    meo = (perigee_km > 2000) & (apogee_km < 35586) & (eccentricity <= 0.25)
    geo = near_geo & (inclination_deg <= 15)
    heo = (eccentricity > 0.25) & (apogee_km > 31570)
    return np.select([leo, meo, geo, heo], range(len(REGIMES)), default=OTHER)


class Catalogue(NamedTuple):
    """Objects of a catalogue that can be used.

    Attributes:
        features: ``(N, 6)`` in the order and units of :data:`FEATURE_NAMES`; RCS is NaN or above 0.
        labels: Indices into :data:`REGIMES`, or :data:`OTHER`, ``(N,)``.
        num_invalid: Rows left out because an orbital element is missing or impossible.
        table: The file, all of its rows and columns.
        rows: Number of each object in it, ``(N,)``.
    """

    features: Array
    labels: Labels
    num_invalid: int
    table: pd.DataFrame
    rows: npt.NDArray[np.int64]


def read_catalogue(path: str | Path) -> Catalogue:
    """Read and label a catalogue of orbital elements.

    Args:
        path: A .csv or .csv.gz file with the columns of :data:`FEATURE_NAMES`, ``perigee_km`` and
            ``apogee_km``; others are ignored.

    Returns:
        The rows with valid elements, in the order of the file. An RCS that is missing or not above 0 becomes
        NaN.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a table, lacks a column, or holds no valid row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"catalogue must be an existing .csv or .csv.gz file; got {path}. Correct the path.")
    try:
        table = pd.read_csv(path, low_memory=False)
    except (
        pd.errors.EmptyDataError,
        pd.errors.ParserError,
        UnicodeDecodeError,
        EOFError,
        OSError,
        zlib.error,
    ) as error:
        raise ValueError(f"catalogue must be a .csv or .csv.gz table; {path} is not ({error}).") from error
    columns = [*FEATURE_NAMES, "perigee_km", "apogee_km"]
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(
            f"catalogue must have the columns {', '.join(columns)}; {path} lacks {', '.join(missing)}. "
            "Rename or add them."
        )
    numbers = table[columns].apply(pd.to_numeric, errors="coerce").astype(float)
    numbers["rcs_m2"] = numbers["rcs_m2"].where(np.isfinite(numbers["rcs_m2"]) & (numbers["rcs_m2"] > 0))
    valid = np.isfinite(numbers.drop(columns="rcs_m2")).all(axis=1)
    valid &= (numbers["semi_major_axis_km"] > 0) & (numbers["period_min"] > 0)
    valid &= numbers["eccentricity"].between(0, 1, inclusive="left") & numbers["inclination_deg"].between(0, 180)
    if not valid.any():
        raise ValueError(f"catalogue must hold at least one row of valid elements; {path} holds none. Check its units.")
    kept = numbers[valid]
    orbit = ("perigee_km", "apogee_km", "eccentricity", "inclination_deg")
    labels = label_regimes(*(kept[column].to_numpy() for column in orbit))
    rows = np.flatnonzero(valid.to_numpy())
    return Catalogue(kept[list(FEATURE_NAMES)].to_numpy(), labels, int((~valid).sum()), table, rows)
