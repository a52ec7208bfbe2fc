"""Kernel library: which compiled library runs here, or why none does.

Loaded by ctypes, which NumPy has imported anyway, so that neither a parser of declarations nor another package is
needed at start. The library names the source that it was built from; one of another source is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from outstation.foundation.arrays import Float32s, Float64s

FOLDER = Path(__file__).parent
SOURCE, NAME = FOLDER / "kernel.c", "kernel.so"
SWITCH = "OUTSTATION_KERNEL"  # environment: "off" goes by NumPy, a variant's name selects it
_DIGEST_BYTES = 32  # SHA-256 of the library, at the end of its file
BASELINE, AVX2 = "baseline", "avx2"

Function = Callable[..., int]
# A buffer of any size, which is asked for its address alone.
_Buffer, _address_of = ctypes.c_char * 0, ctypes.addressof


class Library:
    """Functions of one variant of the compiled library."""

    def __init__(self, library: ctypes.CDLL, variant: str) -> None:
        self._library = library
        self.variant = variant

    @cached_property
    def count_rows(self) -> Function:
        return self._function("count_rows", 4, 16)

    @cached_property
    def add_groups(self) -> Function:
        return self._function("add_groups", 2, 7)

    @cached_property
    def count_scores(self) -> Function:
        return self._function("count_scores", 2, 3)

    @cached_property
    def sum_residuals(self) -> Function:
        return self._function("sum_residuals", 3, 9)

    @cached_property
    def measure_windows(self) -> Function:
        return self._function("measure_windows", 5, 6)

    @cached_property
    def add_steps(self) -> Function:
        return self._function("add_steps", 4, 4)

    @cached_property
    def run_cusums(self) -> Function:
        return self._function("run_cusums", 2, 7)

    @cached_property
    def extend_periods(self) -> Function:
        return self._function("extend_periods", 2, 8)

    @cached_property
    def run_means(self) -> Function:
        return self._function("run_means", 3, 5)

    @cached_property
    def extend_signs(self) -> Function:
        return self._function("extend_signs", 3, 8)

    @cached_property
    def add_means(self) -> Function:
        return self._function("add_means", 3, 3)

    @cached_property
    def quantize(self) -> Function:
        return self._function("quantize", 2, 3)

    @cached_property
    def stack_columns(self) -> Function:
        return self._function("stack_columns", 2, 3)

    @cached_property
    def build_windows(self) -> Function:
        return self._function("build_windows", 4, 7)

    @cached_property
    def mean_errors(self) -> Function:
        return self._function("mean_errors", 4, 8)

    @cached_property
    def has_infinite(self) -> Function:
        return self._function("has_infinite", 1, 1)

    @cached_property
    def compare_moments(self) -> Function:
        return self._function("compare_moments", 5, 6)

    @cached_property
    def average_deviations(self) -> Function:
        return self._function("average_deviations", 3, 4)

    @cached_property
    def compare_shares(self) -> Function:
        return self._function("compare_shares", 2, 7)

    @cached_property
    def sum_divergences(self) -> Function:
        return self._function("sum_divergences", 2, 4)

    @cached_property
    def fold_crc(self) -> Function:
        return self._function("fold_crc", 2, 2)

    def _function(self, name: str, numbers: int, arrays: int) -> Function:
        """Return a function of whole numbers, then of addresses."""
        function = self._library[f"{name}_{self.variant}"]
        function.argtypes = [ctypes.c_int64] * numbers + [ctypes.c_void_p] * arrays
        function.restype = ctypes.c_int64
        return function


def digest_source(source: Path = SOURCE) -> str:
    """Return the digest that a library built from this source has in it."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def load(path: Path = FOLDER / NAME, variant: str = "") -> Library:
    """Load a library. Raises OSError that says why it cannot be used."""
    if not path.exists():
        raise OSError("not built: no C compiler was found at installation")
    content = path.read_bytes()
    # A part of it that is missing would end the process by a signal.
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise OSError(f"{path} is damaged: install the program again")
    library = ctypes.CDLL(str(path))
    built_from = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "outstation_kernel_digest"))).decode()
    if built_from != digest_source():
        raise OSError(f"{path.name} was built from another source: install the program again")
    has_avx2 = library.outstation_kernel_has_avx2
    has_avx2.restype = ctypes.c_int64
    variants = [AVX2, BASELINE] if has_avx2() else [BASELINE]
    if variant and variant not in variants:
        raise OSError(f"this processor has no variant {variant!r}; it has {', '.join(variants)}")
    return Library(library, variant or variants[0])


@cache
def _loaded() -> Library | str:
    wanted = os.environ.get(SWITCH, "")
    if wanted == "off":
        return f"switched off by {SWITCH}"
    try:
        return load(variant=wanted)
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def kernel() -> Library | None:
    """Return the library; None if everything goes by NumPy."""
    loaded = _loaded()
    return loaded if isinstance(loaded, Library) else None


def variant() -> str:
    """Return the variant that runs, or "numpy"."""
    library = kernel()
    return "numpy" if library is None else library.variant


def describe() -> str:
    """Return for people what computes, or why it is NumPy."""
    loaded = _loaded()
    return f"the compiled kernel, {loaded.variant}" if isinstance(loaded, Library) else f"NumPy ({loaded})"


def address(array: np.ndarray) -> int:
    """Return the address of a contiguous array's first item."""
    try:
        # A quarter of the time of `array.ctypes`.
        return _address_of(_Buffer.from_buffer(array))
    except TypeError:
        # It is read-only.
        return int(array.ctypes.data)


def to_singles(values: Float32s | Float64s) -> Float32s | None:
    """Return values as the library reads them; None if one is not exact as float32."""
    if values.dtype == np.float32:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values.astype(np.float32))
    return single if ((single == values) | np.isnan(values)).all() else None
