"""Sounds of `sounds.py` as the bundle's rows, 32 log-mel bands each, split by machine.

Run with a Python that has outstation it rebuilds `reference.npz` (machines 1 to 6, nothing wrong), `calibrate.npz`
(7 and 8, nothing wrong: where the threshold is learned) and `../../recordings/machine.npz` (9 to 12, also with faults).
"""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SPEC = HERE / "bundle.toml"
REFERENCE = HERE / "reference.npz"
CALIBRATE = HERE / "calibrate.npz"
HELD_OUT = HERE.parents[1] / "recordings" / "machine.npz"

BANDS, FRAMES = 32, 5
FIELDS = tuple(f"mel{i}" for i in range(BANDS))
STEP_DB = 0.5
TRAINED, THRESHOLD, LATER = range(1, 7), (7, 8), range(9, 13)
ATTRIBUTION = "Made by models/sources/machine/sounds.py: no machine was recorded. Apache-2.0, as this project."
# (fault, severity, takes) of each machine that no training saw.
SCENES = (("none", 1.0, 12), ("bearing", 0.4, 3), ("bearing", 1.0, 4), ("loose", 0.4, 2), ("loose", 1.0, 2))


@dataclass(frozen=True)
class Take:
    """Ten seconds: `rows` (n, 32) dB."""

    rows: NDArray[np.float32]
    machine: int
    fault: str
    severity: float


def windows(path: Path) -> NDArray[np.float32]:
    """(w, 160) of five frames each, from each recording's first one; one after another, as the bundle has them."""
    with np.load(path, allow_pickle=False) as z:
        rows, starts = z["rows"].astype(np.float32) * z["scale"], z["starts"]
    parts = [rows[a:b] for a, b in itertools.pairwise(starts)]
    return np.concatenate([part[: len(part) // FRAMES * FRAMES].reshape(-1, FRAMES * BANDS) for part in parts])


def take(machine: int, number: int, fault: str = "none", severity: float = 1.0) -> Take:
    import sounds

    from outstation.foundation.media import SoundFormat
    from outstation.ml.model.inference import sound

    heard = SoundFormat(**tomllib.loads(SPEC.read_text(encoding="utf-8"))["input"]["sound"])
    return Take(
        sound.compute_mel_rows(sounds.record(machine, number, fault, severity), heard), machine, fault, severity
    )


def save(path: Path, takes: list[Take], rate: float) -> None:
    """`label` is 0 normal, 1 anomaly; `fault` says which one, and whether it is slight."""
    told = [one.fault if one.fault == "none" or one.severity == 1 else f"{one.fault}, slight" for one in takes]
    np.savez_compressed(
        path,
        rows=np.clip(np.rint(np.concatenate([one.rows for one in takes]) / STEP_DB), -128, 127).astype(np.int8),
        scale=np.full(BANDS, STEP_DB, np.float32),
        starts=np.concatenate([[0], np.cumsum([len(one.rows) for one in takes])]).astype(np.int64),
        label=np.array([one.fault != "none" for one in takes], np.int8),
        labels=np.array(["normal", "anomaly"]),
        fault=np.array(told),
        subject=np.array([one.machine for one in takes], np.int8),
        rate=np.float64(rate),
        fields=np.array(FIELDS),
        units=np.array(["dB"] * BANDS),
        attribution=np.array(ATTRIBUTION),
    )


def main() -> None:
    heard = tomllib.loads(SPEC.read_text(encoding="utf-8"))["input"]["sound"]
    rate = heard["rate"] / heard["hop"]
    save(REFERENCE, [take(machine, i) for machine in TRAINED for i in range(10)], rate)
    save(CALIBRATE, [take(machine, i) for machine in THRESHOLD for i in range(12)], rate)
    later = []
    for machine in LATER:
        number = 0
        for fault, severity, count in SCENES:
            later += [take(machine, number + i, fault, severity) for i in range(count)]
            number += count
    save(HELD_OUT, later, rate)
    for path in (REFERENCE, CALIBRATE, HELD_OUT):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
