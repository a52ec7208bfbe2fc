"""Sound as rows: each hop of a WAV file is a row of log-mel bands, or of cepstral coefficients (MFCC).

Frames start at the first sample and are not padded, so a row depends on its own samples only. Hann window; Fourier
transform of the next power of two; mel bands on Slaney's scale with area 1 (as in librosa, used by MLPerf Tiny's
anomaly detection), or on the HTK scale with height 1 (as in TensorFlow, used by its keyword spotting); coefficients by
an orthogonal cosine transform.
"""

from __future__ import annotations

import contextlib
import os
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outstation.foundation import input_files
from outstation.foundation.arrays import Float32s, Float64s
from outstation.foundation.errors import UsageError, explain
from outstation.foundation.media import SoundFormat

SUFFIXES = (".wav",)
# Fits the cache and memory of a small processor. Another block size may change the last bit of sums.
_BLOCK_FRAMES = 256
_MAX_CHANNELS = 32
_LINEAR_HZ, _LINEAR_MEL, _LOG_STEP = 1000.0, 15.0, np.log(6.4) / 27.0


class WavReader:
    """Samples of a PCM WAV file, averaged over its channels. Close it."""

    def __init__(self, path: Path, rate: int, file: BinaryIO | None = None) -> None:
        """Open a file, unless it is open. Raises UsageError if it is not a WAV of this rate, or is truncated."""
        self._path, self._exit_stack = path, contextlib.ExitStack()
        try:
            raw = file or self._exit_stack.enter_context(input_files.open_regular(path))
            self._file = self._exit_stack.enter_context(wave.open(raw))  # noqa: SIM115
            self._width, self._channels = self._file.getsampwidth(), self._file.getnchannels()
            self.sample_count, file_rate = self._file.getnframes(), self._file.getframerate()
            begin = raw.tell()
            present = (raw.seek(0, os.SEEK_END) - begin) // (self._width * self._channels)
            raw.seek(begin)
            if self._channels > _MAX_CHANNELS:
                raise UsageError(f"{path}: has {self._channels} channels, {_MAX_CHANNELS} at most; mix it down first")
            if file_rate != rate:
                raise UsageError(f"{path}: has {file_rate} Hz, the model needs {rate} Hz; resample it first")
            if present < self.sample_count:
                raise UsageError(
                    f"{path}: is truncated, it has {present:,} of the {self.sample_count:,} samples that its header "
                    "declares; copy it again"
                )
        except BaseException as error:
            self._exit_stack.close()
            if isinstance(error, wave.Error | EOFError | RuntimeError):
                problem = f"{path}: not a readable WAV file ({error or 'truncated'}); convert it to PCM WAV"
                raise UsageError(problem) from None
            if isinstance(error, OSError):
                raise UsageError(f"{path}: cannot be read: {explain(error)}") from None
            raise

    def read(self, start: int, stop: int) -> Float64s:
        """Return the samples `start` to `stop`, from -1 to 1. Raises UsageError."""
        try:
            self._file.setpos(start)
            data = self._file.readframes(stop - start)
        except (OSError, wave.Error) as error:
            raise UsageError(f"{self._path}: cannot be read: {error}") from None
        return np.asarray(_decode_pcm(data, self._width).reshape(-1, self._channels).mean(axis=1))

    def close(self) -> None:
        self._exit_stack.close()


def iter_row_blocks(wav: WavReader, spec: SoundFormat, skip: int = 0) -> Iterator[Float32s]:
    """Yield the rows of a file after the first `skip`, in blocks, with the same bits as `compute_mel_rows`."""
    frames = max(0, (wav.sample_count - spec.window) // spec.hop + 1)
    if skip >= frames:
        return
    for first in range(skip // _BLOCK_FRAMES * _BLOCK_FRAMES, frames, _BLOCK_FRAMES):
        last = min(first + _BLOCK_FRAMES, frames) - 1
        rows = compute_mel_rows(wav.read(first * spec.hop, last * spec.hop + spec.window), spec)
        yield rows[max(0, skip - first) :]


def _decode_pcm(data: bytes, width: int) -> Float64s:
    if width == 1:  # the only width without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return padded.view("<i4").reshape(-1) / 2.0**31
    return np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)


def compute_mel_rows(sound: Float64s, spec: SoundFormat) -> Float32s:
    """Compute (frames, bands) from samples (n,); no frame if there are fewer samples than a window."""
    if len(sound) < spec.window:
        return np.zeros((0, len(spec.columns)), np.float32)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.window, dtype=np.float64) / spec.window)
    frames = np.lib.stride_tricks.sliding_window_view(sound, spec.window)[:: spec.hop]
    bands = make_mel_filterbank(spec)
    # TensorFlow's mfccs_from_log_mel_spectrograms: DCT-II times sqrt(2 / mels).
    angle = np.pi * np.outer(np.arange(spec.mels) + 0.5, np.arange(spec.cepstra)) / spec.mels
    cosines = np.cos(angle) * np.sqrt(2.0 / spec.mels)
    out = np.empty((len(frames), len(spec.columns)), np.float32)
    for start in range(0, len(frames), _BLOCK_FRAMES):
        spectrum = np.abs(np.fft.rfft(frames[start : start + _BLOCK_FRAMES] * hann, spec.fft_size, axis=1))
        logs = np.log((spectrum**2 if spec.power == 2 else spectrum) @ bands + spec.floor)
        if spec.decibels:
            logs *= 20.0 / spec.power / np.log(10.0)
        out[start : start + _BLOCK_FRAMES] = logs @ cosines if spec.cepstra else logs
    return out


def make_mel_filterbank(spec: SoundFormat) -> Float64s:
    """Return the triangular mel filters (frequencies, mels)."""
    scale, back, area = (
        (hz_to_mel_slaney, mel_to_hz_slaney, True) if spec.scale == "slaney" else (hz_to_mel_htk, mel_to_hz_htk, False)
    )
    frequency = np.arange(spec.fft_size // 2 + 1, dtype=np.int64) * spec.rate / spec.fft_size
    ends = np.array([spec.low, spec.rate / 2 if spec.high is None else spec.high])
    first, last = (float(end) for end in scale(ends))
    corners = np.linspace(first, last, spec.mels + 2)
    if not area:  # TensorFlow's triangles are linear in mel, and skip the constant
        at, edges = scale(frequency), corners
    else:
        at, edges = frequency, back(corners)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (at[:, None] - low) / (middle - low)
    falling = (high - at[:, None]) / (high - middle)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if area:
        return np.asarray(filters * (2.0 / (high - low)))
    filters[0] = 0.0
    return np.asarray(filters)


def hz_to_mel_slaney(hertz: Float64s) -> Float64s:
    linear = hertz * 3 / 200
    above = _LINEAR_MEL + np.log(np.maximum(hertz, _LINEAR_HZ) / _LINEAR_HZ) / _LOG_STEP
    return np.where(hertz < _LINEAR_HZ, linear, above)


def mel_to_hz_slaney(mel: Float64s) -> Float64s:
    above = _LINEAR_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _LINEAR_MEL) - _LINEAR_MEL))
    return np.where(mel < _LINEAR_MEL, mel * 200 / 3, above)


def hz_to_mel_htk(hertz: Float64s) -> Float64s:
    return np.asarray(1127.0 * np.log1p(hertz / 700.0))


def mel_to_hz_htk(mel: Float64s) -> Float64s:
    return np.asarray(700.0 * np.expm1(mel / 1127.0))
