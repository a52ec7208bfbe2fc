"""Images and sounds: rows from files, and one error for any other file."""

from __future__ import annotations

import contextlib
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.foundation.errors import ConfigError, UsageError
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.ml.datasets import training_data as data
from outstation.ml.model import activation
from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from outstation.ml.model.inference import scores, sound
from outstation.ml.model.inference.inference import Inference
from outstation.workbench.authoring import pack
from scripts.kit.bundles import KEY, MODELS

RATE = 16_000
SOUND_FORMAT = SoundFormat(rate=RATE, window=1024, hop=512, mels=128)
Doubles = NDArray[np.float64]


def tone(hertz: float, seconds: float = 0.5, loud: float = 0.5) -> Doubles:
    return np.asarray(loud * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE))


def write_wav(path: Path, samples: Doubles, *, width: int = 2, rate: int = RATE, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.rint(samples * (2.0 ** (8 * width - 1) - 1)).astype(np.int64) + (128 if width == 1 else 0)
    data = b"".join(int(v).to_bytes(width, "little", signed=width > 1) * channels for v in whole)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)
    return path


def read_samples(path: Path) -> Doubles:
    """Return all samples (n,) of a file, from -1 to 1."""
    with contextlib.closing(sound.WavReader(path, RATE)) as wav:
        return wav.read(0, wav.sample_count)


# --- sound ---


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)])
def test_a_wav_of_any_width_gives_the_same_samples(tmp_path: Path, width: int, channels: int) -> None:
    result = read_samples(write_wav(tmp_path / "a.wav", tone(440), width=width, channels=channels))
    np.testing.assert_allclose(result, tone(440), atol=2.0 ** (2 - 8 * width))


def test_the_mel_scale_is_slaneys_as_librosa_documents_it() -> None:
    """`librosa.mel_frequencies(n_mels=40)`, from its documentation, which ends at 11025 Hz."""
    top = float(sound.hz_to_mel_slaney(np.array([11025.0]))[0])
    result = sound.mel_to_hz_slaney(np.linspace(0, top, 40))
    expected = [0, 85.317, 170.635, 255.952, 341.269, 426.586, 511.904, 597.221, 682.538, 767.855, 853.173, 938.49]
    np.testing.assert_allclose(result[:12], expected, atol=1e-3)
    np.testing.assert_allclose(result[[12, 13, 14, 39]], [1024.856, 1119.114, 1222.042, 11025], atol=1e-3)
    np.testing.assert_allclose(sound.hz_to_mel_slaney(result), np.linspace(0, top, 40))


def test_a_tone_is_loudest_in_its_band_and_ten_times_as_loud_is_20_db() -> None:
    made = sound.compute_mel_rows(tone(1000), SOUND_FORMAT)
    assert made.shape == ((8000 - 1024) // 512 + 1, 128)
    middles = sound.mel_to_hz_slaney(np.linspace(0, float(sound.hz_to_mel_slaney(np.array([8000.0]))[0]), 130))[1:-1]
    assert abs(middles[made[3].argmax()] - 1000) < 40
    louder = sound.compute_mel_rows(tone(1000, loud=0.5) / 10, SOUND_FORMAT)
    np.testing.assert_allclose(made[:, made[3].argmax()] - louder[:, made[3].argmax()], 20, atol=1e-3)


def test_each_slaney_band_has_area_1_and_each_htk_band_is_at_most_1_high() -> None:
    areas = sound.make_mel_filterbank(SoundFormat(rate=RATE, window=4096, hop=512, mels=20)).sum(axis=0) * RATE / 4096
    np.testing.assert_allclose(areas, 1, rtol=0.02)
    high = sound.make_mel_filterbank(
        SoundFormat(rate=RATE, window=4096, hop=512, mels=20, scale="htk", low=20, high=4000)
    ).max(axis=0)
    assert ((high > 0.9) & (high <= 1)).all()


def test_cepstra_of_a_flat_spectrum_are_its_level_and_nothing_else() -> None:
    spec = SoundFormat(
        rate=RATE, window=480, hop=320, mels=40, scale="htk", power=1, decibels=False, floor=1e-6, cepstra=10
    )
    made = sound.compute_mel_rows(np.zeros(RATE), spec)
    assert made.shape == (49, 10)
    np.testing.assert_allclose(made[:, 0], np.log(1e-6) * np.sqrt(2 / 40) * 40, rtol=1e-6)
    np.testing.assert_allclose(made[:, 1:], 0, atol=1e-4)
    assert spec.columns == [f"cepstrum{i}" for i in range(10)]


def test_a_frame_is_made_of_its_own_samples_only() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 4096)
    whole = sound.compute_mel_rows(samples, SOUND_FORMAT)
    np.testing.assert_allclose(sound.compute_mel_rows(samples[512 * 2 :], SOUND_FORMAT), whole[2:], rtol=1e-5)
    assert sound.compute_mel_rows(samples[:1023], SOUND_FORMAT).shape == (0, 128)


def hearing(spec: SoundFormat = SOUND_FORMAT) -> ModelInput:
    return ModelInput(fields=spec.columns, window=WindowSpec(rows=5, step=1, max_gap_s=1.0), sound=spec)


def test_no_window_reaches_from_one_file_into_the_next(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", tone(500, 0.3))
    result = data.read(tmp_path, hearing())
    assert len(result.features) == 2 * 8
    assert np.diff(result.t)[:7].tolist() == [32_000] * 7
    assert np.diff(result.t)[7] > 10_000_000


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda p: write_wav(p / "a.wav", tone(9), rate=44_100),
            "has 44100 Hz, the model needs 16000 Hz; resample",
        ),
        (lambda p: (p / "a.wav").write_bytes(b"RIFF but not really"), "not a readable WAV file"),
        (lambda p: (p / "a.wav").write_bytes(b""), "not a readable WAV file"),
        (lambda p: (p / "a.txt").write_text("x"), "no file in it ends with .wav"),
        (lambda p: p.rmdir(), "cannot be read: No such file or directory"),
    ],
)
def test_a_sound_that_is_none_is_refused_in_one_sentence(tmp_path: Path, make: Any, why: str) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    make(folder)
    with pytest.raises(UsageError) as problem:
        data.read(folder, hearing())
    assert why in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_folder_of_sounds_teaches_an_autoencoder_what_is_normal(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    for i in range(3):
        write_wav(tmp_path / "normal" / f"{i}.wav", tone(120, 4) * 0.2 + random.normal(0, 0.01, 4 * RATE))
    (tmp_path / "spec.toml").write_text(f"""
name = "machine"
version = "1"
kind = "anomaly"
model = "{MODELS / "foreign_autoencoder.tflite"}"
reference = "normal"
golden = "normal"
[input]
sound = {{ rate = {RATE}, window = 1024, hop = 512, mels = 32 }}
window = {{ rows = 5, step = 1 }}
[output]
quantile = 0.95
[drift]
window = 10
""")
    made = pack.pack(tmp_path / "spec.toml", KEY)
    assert any("normal windows are not above it" in note for note in made.notes)
    pack.write_bundle(made, tmp_path / "out")
    result = activation.activate(tmp_path / "out", [KEY.public])
    assert result.bundle.manifest.input.sound == SoundFormat(rate=RATE, window=1024, hop=512, mels=32)
    sound_spec = data.read(tmp_path / "normal" / "1.wav", result.bundle.manifest.input)
    answers = Inference(result.bundle.manifest, result.model).run(sound_spec.features, sound_spec.t)
    message = scores.to_texts(answers.scores, result.bundle.manifest)
    assert message is not None
    assert message.count("normal") > 0.85 * len(message)


# --- images ---


def picture(shape: tuple[int, int, int], kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    out = io.BytesIO()
    pillow.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def looking(image: ImageFormat) -> ModelInput:
    return ModelInput(fields=image.columns, window=WindowSpec(rows=image.height, step=image.height), image=image)


def test_an_image_of_the_right_size_is_its_pixels_scaled(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture((6, 8, 3)))
    spec = looking(ImageFormat(width=8, height=6, scale=1 / 128, offset=-1))
    result = data.read(tmp_path / "a.png", spec)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(result.features, pixels.reshape(6, 24) / 128 - 1, atol=1e-6)


def test_images_are_resized_converted_to_grey_and_turned_upright(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, 30:] = 255
    exif = pillow.Exif()
    exif[0x0112] = 6  # lies on its side: what is right in the file belongs to the bottom
    pillow.fromarray(half).save(tmp_path / "a.jpg", exif=exif, quality=95)
    result = data.read(tmp_path / "a.jpg", looking(ImageFormat(width=4, height=6, channels=1))).features
    assert result.shape == (6, 4)
    np.testing.assert_allclose(result[:2], 0, atol=0.05)
    np.testing.assert_allclose(result[4:], 1, atol=0.05)


def test_folders_name_the_labels_and_each_image_is_one_window(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes((MODELS / "foreign_image.tflite").read_bytes())
    for i in range(60):
        path = tmp_path / "images" / ("person" if i % 3 else "none") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture((32, 32, 3), seed=i))
    (tmp_path / "spec.toml").write_text("""
name = "vww"
version = "1"
kind = "classify"
model = "model.tflite"
labels = ["none", "person"]
golden = "images"
[input]
image = { width = 32, height = 32 }
[output]
calibration_data = "images"
""")
    made = pack.pack(tmp_path / "spec.toml", KEY)
    pack.write_bundle(made, tmp_path / "out")
    result = activation.activate(tmp_path / "out", [KEY.public])
    spec = result.bundle.manifest
    assert len(spec.input.fields) == 96
    seen = data.read(tmp_path / "images", spec.input, data.LabelParser.from_manifest(spec))
    assert seen.label is not None
    assert seen.label[::32].tolist() == [0] * 20 + [1] * 40
    answers = Inference(spec, result.model).run(seen.features, seen.t)
    assert len(answers.scores) == 60


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.png", b"not an image", "not a JPEG or PNG image"),
        ("a.jpg", b"", "not a JPEG or PNG image"),
        ("cut.png", None, "the image cannot be read"),
        ("gif.png", "GIF", "not a JPEG or PNG image"),
    ],
)
def test_an_image_that_is_none_is_refused_in_one_sentence(tmp_path: Path, name: str, content: Any, why: str) -> None:
    pytest.importorskip("PIL.Image")
    made = picture((8, 8, 3), content) if isinstance(content, str) else content
    (tmp_path / name).write_bytes(picture((64, 64, 3))[:800] if made is None else made)
    with pytest.raises(UsageError) as problem:
        data.read(tmp_path, looking(ImageFormat(width=8, height=8)))
    assert why in str(problem.value)
    assert name in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("sound = { rate = 16000, window = 1024, hop = 512, mels = 8, high = 9000 }", "within half the rate"),
        ("sound = { rate = 16000, window = 1024, hop = 512, mels = 8, cepstra = 9 }", "9 cepstra of 8 mels"),
        ("image = { width = 8, height = 8 }\nwindow = { rows = 4, step = 4 }", "the window of an image is its rows"),
        ('image = { width = 8, height = 8 }\nfields = ["a"]', "fields of an image or sound are pixel0 to pixel23"),
        ("image = { width = 8, height = 8, channels = 2 }", "channels"),
        ("", "fields"),
    ],
)
def test_a_spec_of_images_or_sounds_that_makes_no_sense_is_refused(tmp_path: Path, given: str, why: str) -> None:
    (tmp_path / "model.tflite").write_bytes(b"x")
    head = 'name = "x"\nversion = "1"\nkind = "regress"\nmodel = "model.tflite"\n'
    (tmp_path / "spec.toml").write_text(f"{head}[input]\n{given}\n")
    with pytest.raises(ConfigError) as problem:
        pack.pack(tmp_path / "spec.toml", KEY)
    assert why in str(problem.value)
