"""Weather and power of a photovoltaic system, 15 minutes a row, from the files that pvanalytics ships, split by time.

Run as a script it rebuilds `reference.npz` (what the model learns from) and `../../recordings/solar.npz` (later, after
a gap). Only this script needs pvanalytics and pyarrow; everything else reads these two.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "reference.npz"
HELD_OUT = HERE.parents[1] / "recordings" / "solar.npz"

FIELDS = ("ghi", "ghi_clear", "temp_air")
UNITS = ("W/m2", "W/m2", "degC")
FEATURES = ("ghi", "ghi_clear", "temp_air", "ghi_hour", "time_sin", "time_cos")
STEP_S = 900
HOUR_ROWS = 4
OFFSET_H = -7.0
# By date, before any model was trained. Two weeks apart, so that no weather lies on both sides.
TRAIN = (datetime(2011, 4, 15, 7, tzinfo=UTC), datetime(2012, 6, 1, 7, tzinfo=UTC))
LATER = (datetime(2012, 6, 15, 7, tzinfo=UTC), datetime(2014, 1, 1, 7, tzinfo=UTC))
# The weather's steps are whole, its values between two half hours quarters at most; power is kept to 1/8 W.
STEPS = (0.5, 0.5, 0.05)
POWER_STEP = 0.125
ATTRIBUTION = (
    "AC power: PVDAQ system 50, National Renewable Energy Laboratory (NREL), doi 10.25984/1846021. Weather: National "
    "Solar Radiation Database PSM3, NREL. Both as shipped by pvanalytics 0.2.2, MIT License, Copyright (c) 2020, 2022 "
    "Alliance for Sustainable Energy, LLC and National Technology and Engineering Solutions of Sandia, LLC. "
    "Daylight saving time taken out of the power's times, weather interpolated to 15 minutes. "
    "Licence text: models/recordings/README.md"
)


@dataclass(frozen=True)
class Recording:
    """`rows` (n, 3) float32 in `UNITS` at `t` (n,) epoch seconds, 15 minutes apart; `power` (n,) W, NaN unknown."""

    rows: NDArray[np.float32]
    t: NDArray[np.int64]
    power: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.t)

    def between(self, begin: datetime, end: datetime) -> Recording:
        kept = (self.t >= begin.timestamp()) & (self.t < end.timestamp())
        return Recording(self.rows[kept], self.t[kept], self.power[kept])

    @property
    def local(self) -> NDArray[np.int64]:
        """Seconds of Mountain Standard Time, all year."""
        return self.t + int(OFFSET_H * 3600)

    def features(self) -> NDArray[np.float32]:
        """(n, 6) in the order of `FEATURES`: what the bundle's `derived` makes of the same rows."""
        ghi = self.rows[:, 0].astype(np.float64)
        hour = np.array([ghi[max(0, i - HOUR_ROWS + 1) : i + 1].mean() for i in range(len(ghi))])
        angle = 2 * np.pi * (self.local % 86_400) / 86_400
        return np.column_stack([self.rows, hour, np.sin(angle), np.cos(angle)]).astype(np.float32)


def load(path: Path) -> Recording:
    with np.load(path, allow_pickle=False) as z:
        rows = z["rows"].astype(np.float32) * z["scale"]
        return Recording(rows, z["t"], z["power"])


def save(path: Path, recording: Recording) -> None:
    """With columns that an evaluation takes intervals over and looks at: `day`, `month`, `sky`."""
    local = recording.local.astype("datetime64[s]")
    ghi, clear = recording.rows[:, 0], recording.rows[:, 1]
    sky = np.select([clear < 20, ghi >= 0.9 * clear, ghi >= 0.5 * clear], ["night", "clear", "broken"], "overcast")
    scale = np.array(STEPS, np.float32)
    np.savez_compressed(
        path,
        rows=np.rint(recording.rows / scale).astype(np.int16),
        scale=scale,
        t=recording.t,
        power=recording.power,
        day=(recording.local // 86_400).astype(np.int32),
        month=np.array([f"{m:%m %b}" for m in local.astype("datetime64[D]").tolist()]),
        sky=sky,
        rate=np.float64(1 / STEP_S),
        fields=np.array(FIELDS),
        units=np.array(UNITS),
        attribution=np.array(ATTRIBUTION),
    )


def from_pvanalytics() -> Recording:
    """All rows for which there is weather, 2011 to 2013."""
    t, weather = _weather(_file("system_50_ac_power_2_full_DST_psm3.parquet"))
    at, power = _power(_file("system_50_ac_power_2_full_DST.parquet"))
    found = np.full(len(t), np.nan, np.float32)
    place = np.searchsorted(t, at)
    inside = (place < len(t)) & (t[np.minimum(place, len(t) - 1)] == at)
    found[place[inside]] = power[inside]
    return Recording(weather, t, found)


def _file(name: str) -> Path:
    # Found, not imported: `import pvanalytics` needs pandas, pvlib and scikit-learn.
    spec = importlib.util.find_spec("pvanalytics")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pvanalytics is not installed: pip install --no-deps pvanalytics==0.2.2 pyarrow==26.0.1")
    return Path(spec.submodule_search_locations[0]) / "data" / name


def _weather(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Half-hourly values as (n,) epoch seconds and (n, 3), with the middle between each two."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    t = np.asarray(table["index"].cast("int64"), np.int64) // 1_000_000
    grid = np.arange(t[0], t[-1] + 1, STEP_S)
    columns = [np.interp(grid, t, np.asarray(table[name], np.float64)) for name in FIELDS]
    return grid, (np.rint(np.column_stack(columns) / STEPS) * STEPS).astype(np.float32)


def _power(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Watts at epoch seconds. The file calls its times UTC-07:00 all year; its noon says they follow summer time."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    said = np.asarray(table["measured_on"].cast("int64"), np.int64) // 1_000_000 - 7 * 3600
    power = np.asarray(table["ac_power_2"], np.float32)
    denver = ZoneInfo("America/Denver")
    t = np.empty(len(said), np.int64)
    for i, second in enumerate(said.tolist()):
        wall = datetime.fromtimestamp(second, UTC).replace(tzinfo=denver)
        # An hour in autumn comes twice, one in spring never: whose power it is nobody knows. Both are at night.
        twice = wall.utcoffset() != wall.replace(fold=1).utcoffset()
        t[i] = -1 if twice else int(wall.timestamp())
    known = (t >= 0) & np.isfinite(power)
    return t[known], (np.rint(power[known] / POWER_STEP) * POWER_STEP).astype(np.float32)


def main() -> None:
    everything = from_pvanalytics()
    save(REFERENCE, everything.between(*TRAIN))
    save(HELD_OUT, everything.between(*LATER))
    for path in (REFERENCE, HELD_OUT):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
