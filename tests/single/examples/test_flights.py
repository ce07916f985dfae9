"""The flights: figures of the package, and values of a small copy of its files."""

from __future__ import annotations

from pathlib import Path

import flights
import numpy as np
import pandas as pd
import pytest
import torch


@pytest.fixture(scope="module")
def year() -> flights.Flights:
    pytest.importorskip("pandas")
    try:
        return flights.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_rows_and_label_rates_of_the_year(year: flights.Flights) -> None:
    assert len(year.train.labels) + len(year.test.labels) == 327_346
    assert len(year.test.labels) == 53_991
    assert year.train.labels.mean().item() == pytest.approx(0.2420, abs=1e-4)
    assert year.test.labels.mean().item() == pytest.approx(0.2583, abs=1e-4)


def test_settings_are_chosen_without_the_test_months(year: flights.Flights) -> None:
    held_out = flights.load(validate=True)
    assert len(held_out.train.labels) + len(held_out.test.labels) == len(year.train.labels)
    assert torch.equal(held_out.train.labels, year.train.labels[: len(held_out.train.labels)])
    assert torch.equal(held_out.test.labels, year.train.labels[len(held_out.train.labels) :])
    month = flights.CATEGORIES.index("month")
    assert held_out.train.ids[:, month].max() == 9 and not held_out.test.ids[:, month].any()


def test_ids_fit_their_tables_and_months_of_the_test_are_unknown(year: flights.Flights) -> None:
    sizes = torch.tensor(year.table_sizes)
    for part in (year.train, year.test):
        assert part.ids.ge(0).all() and part.ids.lt(sizes).all() and part.dense.isfinite().all()
    month = flights.CATEGORIES.index("month")
    assert year.train.ids[:, month].min() == 1 and year.train.ids[:, month].max() == 10
    assert not year.test.ids[:, month].any()


def test_dense_features_are_scaled_on_the_training_rows(year: flights.Flights) -> None:
    scaled = [i for i, name in enumerate(year.dense_names) if not name.startswith("no_")]
    assert year.train.dense[:, scaled].mean(0).abs().max() < 1e-3
    assert year.train.dense[:, scaled].std(0).max() < 1.01
    assert year.test.dense[:, scaled].mean(0).abs().max() > 0.1


def test_ranks_share_each_chunk_in_order_of_time(year: flights.Flights) -> None:
    ranks = [list(year.train_batches(256, rank=rank, size=3)) for rank in range(3)]
    assert {len(batches) for batches in ranks} == {273_355 // (3 * 256)}
    together = torch.stack([torch.stack([batch.ids for batch in batches]) for batches in ranks], dim=2)
    whole = together.flatten(0, 2)  # [steps * batch * ranks, tables]
    assert torch.equal(whole, year.train.ids[: len(whole)])
    assert torch.equal(torch.cat([batch.labels for batch in year.test_batches(1000)]), year.test.labels)


def flight(month: int, clock: int, *, late: float, tailnum: str = "N1", utc_hour: int = 12) -> dict[str, object]:
    return {
        "month": month,
        "day": 2,
        "sched_dep_time": clock,
        "sched_arr_time": (clock + 200) % 2400,
        "hour": clock // 100,
        "time_hour": f"2013-{month:02d}-02T{utc_hour:02d}:00:00Z",
        "carrier": "UA",
        "flight": 7,
        "tailnum": tailnum,
        "origin": "EWR",
        "dest": "IAH",
        "distance": 1400,
        "arr_delay": late,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pd.DataFrame(
        [
            flight(1, 745, late=15, utc_hour=12),
            flight(1, 715, late=14, tailnum="N2", utc_hour=12),
            flight(3, 2345, late=-3, utc_hour=5),
            flight(4, 800, late=np.nan, utc_hour=12),
            flight(11, 900, late=60, tailnum="N9", utc_hour=14),
        ]
    ).to_csv(tmp_path / "flights.csv.zip", index=False)
    weather = {name: 1.0 for name in flights.WEATHER} | {"origin": "EWR"}
    times = ["2013-01-02T11:00:00Z", "2013-01-02T12:00:00Z", "2013-03-02T04:00:00Z"]
    temperatures = [10.0, 99.0, 30.0]
    pd.DataFrame(
        [weather | {"time_hour": at, "temp": value} for at, value in zip(times, temperatures, strict=True)]
    ).to_csv(tmp_path / "weather.csv", index=False)
    pd.DataFrame({"tailnum": ["N1"], "year": [2003.0]}).to_csv(tmp_path / "planes.csv", index=False)
    return tmp_path


def test_labels_order_and_vocabularies_by_hand(folder: Path) -> None:
    data = flights.load(folder)
    tailnum = flights.CATEGORIES.index("tailnum")
    assert data.train.labels.tolist() == [0, 1, 0]  # 07:15 comes before 07:45; the flight without arrival is gone
    assert data.test.labels.tolist() == [1]
    assert data.train.ids[:, tailnum].tolist() == [1, 2, 2] and data.test.ids[0, tailnum] == 0


def test_weather_is_of_an_earlier_hour_than_the_departure(folder: Path) -> None:
    rows = flights.join(*(pd.read_csv(folder / name) for name in ("flights.csv.zip", "weather.csv", "planes.csv")))
    assert rows["temp"].tolist()[:3] == [10, 10, 30]  # not the 99 of the hour of departure
    assert np.isnan(rows["temp"].iloc[3])  # nothing within six hours
    assert rows["plane_age"].tolist()[1:3] == [10, 10]


def test_duration_runs_over_midnight(folder: Path) -> None:
    data = flights.load(folder)
    duration = data.train.dense[:, data.dense_names.index("duration")]
    assert torch.equal(duration, torch.zeros(3))  # two hours each: no deviation, scaled to 0


def test_missing_package_and_file_and_column_name_their_remedy(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pip install no_such_flights"):
        flights.package_folder("no_such_flights")
    (folder / "planes.csv").write_text("tailnum\nN1\n")
    with pytest.raises(ValueError, match=r"planes\.csv.*expected.*year.*force-reinstall"):
        flights.load(folder)
    (folder / "planes.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"planes\.csv is missing.*pip install"):
        flights.load(folder)
