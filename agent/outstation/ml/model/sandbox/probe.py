"""Probe: check a bundle in a child process, so that a bad model can crash only that process.

Checks, each only after the previous ones passed:
- load: the runtime loads the model; it has one input and the selected output, and keeps no state
- shapes: it takes the values of the manifest's input, and returns those of the manifest's kind
- batch: rows in a batch get the same outputs as alone, in any order
- golden: the golden vectors match
On request the same process then tunes batch size and threads (`autotune`).
"""

from __future__ import annotations

import io
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import BadBundle
from outstation.foundation.indices import repeat
from outstation.ml.model.bundle import builtin, manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import Manifest, ResourceLimits
from outstation.ml.model.bundle.tensor_selection import TensorSelection
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.tensors import ModelInspection, OutputStats
from outstation.ml.model.inference.tuning import MAX_TUNING_S, Tuning
from outstation.ml.model.sandbox import child_process, confinement, launch, memory
from outstation.ml.model.sandbox.confinement import ModelPolicy

if TYPE_CHECKING:
    from outstation.foundation.arrays import Float32s
    from outstation.ml.model.bundle.golden_vectors import GoldenVectors
    from outstation.ml.model.inference.runtime import TfliteModel


# Added to the bundle's CPU seconds: starting Python takes time on a small or busy board, and waiting takes no CPU.
_GRACE_S = 30.0
# Rows that are run alone and as a batch.
_COMPARED_ROWS = 5
# Rows of noise that show how the outputs behave.
_INSPECTED_ROWS = 64
Check = tuple[str, bool, str]


class ProbeReport(msgspec.Struct, frozen=True):
    """Result of a probe; `checks` are (name, ok, detail); `peak_memory` is the child's in bytes, 0 if it died."""

    runtime: str
    checks: list[Check]
    tuning: Tuning | None = None
    peak_memory: int = 0

    @property
    def ok(self) -> bool:
        return all(ok for _, ok, _ in self.checks)

    def raise_for_failure(self) -> None:
        """Raise BadBundle with the check that failed, if one did."""
        for name, ok, detail in self.checks:
            if not ok:
                raise BadBundle(f"{name}: {detail}")


class _ProbeRequest(msgspec.Struct):
    """Input of the child. Without a manifest it inspects the model; it tunes only if `known_tunings` is set."""

    files: dict[str, bytes]
    policy: ModelPolicy
    trusted_content: bytes
    known_tunings: list[Tuning] | None = None


def probe(
    bundle: Bundle,
    known_tunings: Sequence[Tuning] | None = None,
    policy: ModelPolicy | None = None,
    *,
    grace_s: float = _GRACE_S,
) -> ProbeReport:
    """Probe `bundle` within its limits and those of `policy`.

    With `known_tunings` the report has a tuning, known or measured. `grace_s`: real time beyond its CPU seconds.
    """
    needed = ("manifest.json", "model.tflite", "golden.npz")
    files, policy = {name: bundle.files[name] for name in needed if name in bundle.files}, policy or ModelPolicy()
    request = _ProbeRequest(files, policy, builtin.read_smallest_model())
    request.known_tunings = None if known_tunings is None else list(known_tunings)
    limits = policy.cap(bundle.manifest.limits)
    try:
        policy.check()
        output, death = _run_child(request, limits, grace_s)
        report, _, tuned = output.partition(b"\n")
        if death and (known_tunings is None or not report):
            raise BadBundle(death)
        runtime, checks, peak = decoders.from_json(report, tuple[str, list[Check], int])
        if death:
            # A batch that was too large is no failure: the model itself passed.
            if death != _out_of_memory_detail(limits):
                checks.append(("autotune", False, death))
            return ProbeReport(runtime, checks, peak_memory=peak)
        return ProbeReport(runtime, checks, decoders.from_json(tuned, Tuning) if tuned else None, peak)
    except BadBundle as problem:
        return ProbeReport("", [("load", False, str(problem))])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return ProbeReport("", [("load", False, f"the child process returned invalid output ({error})")])


def inspect_model(content: bytes) -> ModelInspection:
    """Inspect a model in a child process. Raises BadBundle if the model cannot run here."""
    output, death = _run_child(
        _ProbeRequest({"model.tflite": content}, ModelPolicy(), builtin.read_smallest_model()), ResourceLimits()
    )
    if death:
        raise BadBundle(death)
    try:
        inspection = decoders.from_json(output, ModelInspection | str)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadBundle(f"the child process returned invalid output ({error})") from None
    if isinstance(inspection, str):
        raise BadBundle(inspection)
    return inspection


def _run_child(request: _ProbeRequest, limits: ResourceLimits, grace_s: float = _GRACE_S) -> tuple[bytes, str]:
    """Return the child's output and the cause of its death, or "". Raises BadBundle if it does not finish."""
    timeout_s = limits.cpu_seconds + grace_s + (0.0 if request.known_tunings is None else MAX_TUNING_S)
    try:
        child = launch.run_module("outstation.ml.model.sandbox.probe", msgspec.msgpack.encode(request), timeout_s)
    except subprocess.TimeoutExpired:
        raise BadBundle(f"did not finish within {timeout_s:g} s and was killed") from None
    return child.stdout, describe_death(child.returncode, child.stderr, limits) if child.returncode else ""


def run_checks(files: dict[str, bytes]) -> tuple[str, list[Check]]:
    """Run all checks, in the child. Return the runtime and the checks."""
    from outstation.ml.model.bundle import golden_vectors
    from outstation.ml.model.inference import runtime

    content = manifest.decode(files["manifest.json"])
    checks: list[Check] = []

    def run_step(name: str, action: Callable[[], str]) -> bool:
        try:
            checks.append((name, True, action()))
        except BadBundle as problem:
            checks.append((name, False, str(problem) + (runtime.explain_kernels(model) if name != "shapes" else "")))
        return checks[-1][1]

    try:
        model = runtime.load_model(content, files["model.tflite"])
        rows = f"batches of {model.batch}" if model.batch > 1 else "one row at a time"
        checks.append(("load", True, f"{len(files['model.tflite'])} bytes, {rows}"))
        vectors = golden_vectors.decode(files["golden.npz"]) if "golden.npz" in files else None
    except BadBundle as problem:
        checks.append(("golden" if checks else "load", False, str(problem)))
        return runtime_name(), checks
    sound = run_step("shapes", lambda: _check_shapes(model, content)) and run_step(
        "batch", lambda: _check_batching(model, vectors)
    )
    if sound and vectors is not None:
        classes = content.kind == "classify" and not content.output.multi_label
        run_step("golden", lambda: vectors.compare(model.invoke(vectors.inputs), runtime_name(), classes=classes))
    return runtime_name(), checks


def _check_shapes(model: TfliteModel, content: Manifest) -> str:
    spec, output = content.input, content.output
    wanted, (have, *joined) = spec.rows * len(spec.columns), model.input_sizes
    for (name, other), size in zip(content.joined.items(), joined, strict=True):
        if size != other.size:
            raise BadBundle(
                f"the model's input {name!r} takes {size} values, [inputs.{name}] has {other.rows} rows x "
                f"{len(other.fields)} fields = {other.size}; correct it and pack the bundle again"
            )
    for (name, further), size in zip(content.further.items(), model.output_sizes[1:], strict=True):
        if size != further.values:
            raise BadBundle(
                f"the model's output {name!r} has {size} values, [outputs.{name}] describes {further.values}; name "
                "each label or value, or write size = 1 for two labels of one sigmoid"
            )
    outputs = model.output_sizes[0]
    if wanted != have:
        noun = "features" if spec.derived or spec.feature_order else "fields"
        raise BadBundle(
            f"the model takes {have} values {list(model.input_shape)}, the manifest's input has "
            f"{spec.rows} rows x {len(spec.columns)} {noun} = {wanted}; correct [input] and pack it again"
        )
    labels, actual = len(output.labels), f"the model has {outputs} outputs"
    is_binary = outputs == 1 and labels == 2 and not output.multi_label
    if content.kind == "classify" and outputs != labels and not is_binary:
        raise BadBundle(f"{actual}, the manifest names {labels} labels; name each class")
    if content.kind == "regress" and outputs != max(1, len(output.names)):
        values = "one value" if not output.names else f"the {len(output.names)} values of [output] names"
        raise BadBundle(f"{actual}, kind regress reports {values}; name each output in [output] names")
    if content.kind == "anomaly" and outputs not in (1, wanted):
        raise BadBundle(f"{actual}; kind anomaly needs one score, or {wanted} outputs for its {wanted} inputs")
    if content.kind == "embedding" and output.centroid and outputs != len(output.centroid):
        raise BadBundle(f"{actual}, the manifest's centroid has {len(output.centroid)}; pack it again")
    return f"{sum(model.input_sizes)} values in, {model.outputs} out"


def _sample_rows(model: TfliteModel, vectors: GoldenVectors | None, count: int) -> Float32s:
    """Return up to `count` golden inputs, or noise if there are none of that shape."""
    if vectors is not None:
        rows = vectors.inputs[:count]
        if len(rows) >= _COMPARED_ROWS and rows.size == len(rows) * math.prod(model.input_shape):
            return rows
    return _noise(model, count)


def _noise(model: TfliteModel, count: int) -> Float32s:
    import numpy as np

    low, high = model.input_range
    return np.random.default_rng(0).uniform(low, high, (count, *model.input_shape)).astype(np.float32)


def _check_batching(model: TfliteModel, vectors: GoldenVectors | None) -> str:
    """Compare rows alone, last row first, with a batch: this detects state, and rows that are mixed."""
    import numpy as np

    rows = _sample_rows(model, vectors, _COMPARED_ROWS)
    together = model.invoke(rows)
    alone = np.concatenate([model.invoke(rows[i : i + 1]) for i in reversed(range(len(rows)))])[::-1]
    difference = float(np.abs(together - alone).max())
    floats = 1e-4 * np.maximum(1.0, np.abs(alone).max(axis=0))
    steps = repeat(np.asarray(model.output_steps), model.output_sizes)
    allowed = np.where(steps > 0, steps, floats)
    if not (np.abs(together - alone) <= allowed).all():
        raise BadBundle(
            f"a row's output depends on other rows (off by {difference:.4g}): the model keeps state or "
            "mixes the rows of a batch, so its results would depend on how readings are batched"
        )
    return f"{len(rows)} rows, alone and together: off by {difference:.2g}"


def _out_of_memory_detail(limits: ResourceLimits) -> str:
    return f"ran out of memory, the limit is {limits.memory_mib} MiB ([limits] memory_mib)"


def describe_death(code: int, stderr: bytes, limits: ResourceLimits) -> str:
    text = stderr.decode(errors="replace").strip()
    if code == -signal.SIGXCPU:
        return f"used more than its {limits.cpu_seconds} s of CPU and was killed ([limits] cpu_seconds)"
    if "MemoryError" in text or "bad_alloc" in text or code == -signal.SIGKILL:
        return _out_of_memory_detail(limits)
    if code < 0:
        cause = child_process.describe_exit(code)
        return f"the runtime crashed on it ({cause}); the model is damaged or not for this runtime"
    return f"the child process failed ({code}): {text[-300:]}"


def main() -> None:
    request = decoders.from_msgpack(sys.stdin.buffer.read(), _ProbeRequest)
    if "manifest.json" not in request.files:
        _give_up_rights(request, ResourceLimits())
        sys.stdout.buffer.write(msgspec.json.encode(_inspect_in_child(request.files["model.tflite"])))
        return
    limits = request.policy.cap(manifest.decode(request.files["manifest.json"]).limits)
    batch_bytes = _give_up_rights(request, limits)
    runtime_name, checks = run_checks(request.files)
    # Flushed now: a crash while tuning must not lose the checks.
    sys.stdout.buffer.write(msgspec.json.encode((runtime_name, checks, memory.peak_bytes())) + b"\n")
    sys.stdout.buffer.flush()
    if request.known_tunings is not None and all(ok for _, ok, _ in checks):
        # Tuning may use every core, within the hard limit.
        used = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        allowed = used + limits.cpu_seconds + math.ceil(MAX_TUNING_S) * (os.cpu_count() or 1)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (min(allowed, hard), hard))
        sys.stdout.buffer.write(msgspec.json.encode(_tune(request.files, request.known_tunings, batch_bytes)))


def _inspect_in_child(content: bytes) -> ModelInspection | str:
    """Return the tensors and how each output behaves for noise; the reason if the model does not run."""
    from outstation.ml.model.inference import runtime

    try:
        inputs, outputs = runtime.list_tensors(content)
        every_input = tuple(range(len(inputs)))
        selections = [TensorSelection(every_input, (i,)) for i in range(len(outputs))]
        models = [runtime.TfliteModel(content, tensors=tensors) for tensors in selections]
        return ModelInspection(inputs, outputs, [_measure_output(model) for model in models])
    except BadBundle as problem:
        return str(problem)


def _measure_output(model: TfliteModel) -> OutputStats:
    import numpy as np

    outputs = model.invoke(_noise(model, _INSPECTED_ROWS)).astype(np.float64)
    outputs = np.nan_to_num(outputs, nan=np.inf, posinf=1e300, neginf=-1e300)
    with np.errstate(over="ignore"):
        sums, norms = outputs.sum(axis=1), np.sqrt(np.square(outputs).sum(axis=1))
    bounds = [float(f(x)) for x in (outputs, sums, norms) for f in (np.min, np.max)]
    finite = [value if math.isfinite(value) else 1e300 for value in bounds]
    return OutputStats(finite[0], finite[1], (finite[2], finite[3]), (finite[4], finite[5]))


def _tune(files: dict[str, bytes], known_tunings: list[Tuning], batch_bytes: int) -> Tuning:
    from outstation.ml.model.bundle import golden_vectors
    from outstation.ml.model.inference import runtime
    from outstation.ml.model.inference.tuning import find_known
    from outstation.ml.model.sandbox import autotune

    spec, content = manifest.decode(files["manifest.json"]), files["model.tflite"]
    known = find_known(known_tunings, content, runtime_name(), spec.tensors)
    if known is not None:
        return known
    vectors = golden_vectors.decode(files["golden.npz"]) if "golden.npz" in files else None
    rows = _sample_rows(runtime.load_model(spec, content), vectors, autotune.SAMPLE_ROWS)
    return autotune.tune(content, rows, batch_bytes, tensors=spec.tensors)


def _give_up_rights(request: _ProbeRequest, limits: ResourceLimits) -> int:
    """Limit memory and CPU time beyond those of the start, then confine the process.

    Return the bytes that a batch may take.
    """
    import numpy as np
    import psutil

    import outstation.ml.model.bundle.golden_vectors
    import outstation.ml.model.sandbox.autotune  # noqa: F401
    from outstation.ml.model.inference import runtime, tuning

    # NumPy imports more at its first random number and its first archive, when a confined process can read no files.
    archive = io.BytesIO()
    np.savez(archive, values=np.random.default_rng(0).random(1))
    np.load(io.BytesIO(archive.getvalue()))["values"]

    memory.limit_growth(limits.memory_mib << 20)
    cpu = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + limits.cpu_seconds
    tuning_cpu = limits.cpu_seconds + math.ceil(MAX_TUNING_S) * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + tuning_cpu))
    available = int(psutil.virtual_memory().available)
    tuning.describe_machine()
    memory.peak_bytes()
    runtime.detect_processor(request.trusted_content)
    confinement.confine_by(request.policy)
    return min(limits.memory_mib << 19, available // 8)


if __name__ == "__main__":
    main()
