"""Train the network on machines 1 to 6 with nothing wrong: `weights.npz`, and the scaling for `bundle.toml`, printed.

A tenth of the windows says when it is enough. Neither the machines the threshold is learned on nor those held out, and
no fault at all, are opened.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import network
import numpy as np
import recordings

WEIGHTS = recordings.HERE / "weights.npz"
EPOCHS = 120


def main() -> None:
    keras.utils.set_random_seed(1)
    windows = recordings.windows(recordings.REFERENCE)
    each = windows.reshape(-1, recordings.BANDS)
    mean, std = each.mean(0), each.std(0)
    x = network.scale(windows, mean, std)
    apart = np.arange(len(x)) % 10 == 0
    model = network.build_to_train()
    steps = EPOCHS * int((~apart).sum()) // 128
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)), "mse")
    best = keras.callbacks.EarlyStopping(patience=EPOCHS, restore_best_weights=True)
    told = model.fit(
        x[~apart],
        x[~apart],
        validation_data=(x[apart], x[apart]),
        epochs=EPOCHS,
        batch_size=128,
        callbacks=[best],
        verbose=0,
    )
    network.save_weights(WEIGHTS, model, mean, std)
    print(f"error of the windows kept apart: {min(told.history['val_loss']):.3f} of a variance")
    print(f"mean = {[round(float(v), 4) for v in mean]}")
    print(f"std = {[round(float(v), 4) for v in std]}")


if __name__ == "__main__":
    main()
