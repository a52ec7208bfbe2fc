"""Train the network: `weights.npz`, and the scaling that `bundle.toml` needs, printed.

The best epoch is chosen on every seventh day of the training time. The held-out time is not opened.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import network
import numpy as np
import recordings

WEIGHTS = recordings.HERE / "weights.npz"
EPOCHS = 150
NIGHT = 1.0  # W/m2 of a clear sky: at night there is nothing to learn, and a few nights teach it


def main() -> None:
    keras.utils.set_random_seed(3)
    recording = recordings.load(recordings.REFERENCE)
    features = recording.features()
    mean, std = features.mean(0), features.std(0)
    night = recording.rows[:, 1] < NIGHT
    kept = np.isfinite(recording.power) & (~night | (np.arange(len(night)) % 8 == 0))
    kept[: recordings.HOUR_ROWS] = False
    x = network.scale(features, mean, std)
    y = recording.power[:, None] / network.POWER_W
    apart = (recording.local // 86_400) % 7 == 0
    model = network.build()
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, EPOCHS * 150)), "mae")
    best = keras.callbacks.EarlyStopping(
        patience=EPOCHS, restore_best_weights=True, monitor="val_loss", start_from_epoch=5
    )
    told = model.fit(
        x[kept & ~apart],
        y[kept & ~apart],
        validation_data=(x[kept & apart], y[kept & apart]),
        epochs=EPOCHS,
        batch_size=128,
        callbacks=[best],
        verbose=0,
    )
    network.save_weights(WEIGHTS, model, mean, std)
    print(f"MAE of the days kept apart, nights thinned out: {min(told.history['val_loss']) * network.POWER_W:.1f} W")
    print(f"mean = {mean.tolist()}")
    print(f"std = {std.tolist()}")


if __name__ == "__main__":
    main()
