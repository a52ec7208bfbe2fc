"""Load a bundle and run its golden vectors in a child process: a bad model may crash, and then only the child dies.

Checks, each only where those before it passed:
- load: the runtime takes the model, it has one input, the output that is named, and keeps no state
- shapes: it takes what the manifest's input gives, and gives what the manifest's kind needs
- batch: rows in a batch get the answers they get alone, in any order
- golden: the golden vectors come out as published
Where it is asked for, the batch size and the threads are chosen then (`trial`), in the same child.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.errors import BadBundle
from agent.model.bundle import manifest
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.manifest import Manifest, ResourceLimits
from agent.model.inference.tensors import ModelInspection
from agent.model.inference.tuning import MAX_TUNING_S, Tuning

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agent.model.bundle.golden_vectors import GoldenVectors
    from agent.model.inference.runtime import TfliteModel

    Floats = NDArray[np.float32]

# On top of the bundle's own seconds of CPU: starting Python takes some on a small board, and waiting takes no CPU.
GRACE_S = 10.0
_COMPARED_ROWS = 5  # rows that are compared alone and together; more than a batch of single rows
Check = tuple[str, bool, str]


class ProbeReport(msgspec.Struct, frozen=True):
    """What the child saw; `checks` are (name, ok, detail). `choice` where one was asked for and could be made.

    `memory`: the bytes that the child took in all for these, with Python and the runtime in it; 0 where it died.
    """

    runtime: str
    checks: list[Check]
    tuning: Tuning | None = None
    peak_memory: int = 0

    @property
    def ok(self) -> bool:
        return all(ok for _, ok, _ in self.checks)

    def raise_for_failure(self) -> None:
        """Raises BadBundle with the check that failed."""
        for name, ok, detail in self.checks:
            if not ok:
                raise BadBundle(f"{name}: {detail}")


class _ProbeRequest(msgspec.Struct):
    """What the child is given. Without a manifest it looks at the model; no choice is made where `known` is None."""

    files: dict[str, bytes]
    known_tunings: list[Tuning] | None = None


def probe(bundle: Bundle, known_tunings: Sequence[Tuning] | None = None) -> ProbeReport:
    """Run the checks on the verified bytes of `bundle`, within its limits of memory and time.

    With `known` choices, one for this model is taken from them or made anew, within two more seconds.
    """
    needed = ("manifest.json", "model.tflite", "golden.npz")
    task = _ProbeRequest({name: bundle.files[name] for name in needed if name in bundle.files})
    task.known_tunings = None if known_tunings is None else list(known_tunings)
    limits = bundle.manifest.limits
    try:
        said, death = _run_child(task, limits)
        checked, _, chosen = said.partition(b"\n")
        if death and (known_tunings is None or not checked):
            raise BadBundle(death)
        runtime, checks, memory = msgspec.json.decode(checked, type=tuple[str, list[Check], int])
        if death:
            return ProbeReport(runtime, [*checks, *_tuning_failure(death, limits)], peak_memory=memory)
        return ProbeReport(runtime, checks, msgspec.json.decode(chosen, type=Tuning) if chosen else None, memory)
    except BadBundle as problem:
        return ProbeReport("", [("load", False, str(problem))])
    except msgspec.MsgspecError as error:
        return ProbeReport("", [("load", False, f"the child process answered something else ({error})")])


def inspect_model(content: bytes) -> ModelInspection:
    """What a model says of itself, and what it answers to noise. Raises BadBundle where it cannot be run here."""
    said, death = _run_child(_ProbeRequest({"model.tflite": content}), ResourceLimits())
    if death:
        raise BadBundle(death)
    found = msgspec.json.decode(said, type=ModelInspection | str)
    if isinstance(found, str):
        raise BadBundle(found)
    return found


def _run_child(request: _ProbeRequest, limits: ResourceLimits) -> tuple[bytes, str]:
    """What the child says, and what it died of, "" where it did not. Raises BadBundle where it does not finish."""
    patience_s = limits.seconds + GRACE_S + (0.0 if request.known_tunings is None else MAX_TUNING_S)
    try:
        child = subprocess.run(
            # -P: an `agent` in the folder it happens to run in is not ours.
            [sys.executable, "-P", "-m", "agent.model.sandbox.probe"],
            input=msgspec.msgpack.encode(request),
            capture_output=True,
            timeout=patience_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadBundle(f"did not finish within {patience_s:g} s and was ended") from None
    return child.stdout, describe_death(child.returncode, child.stderr, limits) if child.returncode else ""


def run_checks(files: dict[str, bytes]) -> tuple[str, list[Check]]:
    """What the child does."""
    from agent.model.bundle import golden_vectors
    from agent.model.inference import inference, runtime

    content = manifest.decode(files["manifest.json"])
    checks: list[Check] = []

    def run_step(name: str, action: Callable[[], str]) -> bool:
        try:
            checks.append((name, True, action()))
        except BadBundle as problem:
            checks.append((name, False, str(problem)))
        return checks[-1][1]

    try:
        model = inference.load_model(content, files["model.tflite"])
        checks.append(("load", True, f"{len(files['model.tflite'])} bytes, {_describe_batch(model)}"))
        vectors = golden_vectors.decode(files["golden.npz"]) if "golden.npz" in files else None
    except BadBundle as problem:
        checks.append(("golden" if checks else "load", False, str(problem)))
        return runtime.RUNTIME_NAME, checks
    sound = run_step("shapes", lambda: _check_shapes(model, content)) and run_step(
        "batch", lambda: _check_batching(model, vectors)
    )
    if sound and vectors is not None:
        classes = content.kind == "classify" and not content.output.multi_label
        run_step("golden", lambda: vectors.compare(model.invoke(vectors.inputs), runtime.RUNTIME_NAME, classes=classes))
    return runtime.RUNTIME_NAME, checks


def _describe_batch(model: TfliteModel) -> str:
    return f"batches of {model.batch}" if model.batch > 1 else "one row at a time"


def _check_shapes(model: TfliteModel, content: Manifest) -> str:
    spec, output = content.input, content.output
    wanted, have = spec.rows * len(spec.columns), math.prod(model.input_shape)
    if wanted != have:
        what = "features" if spec.derived or spec.order else "fields"
        raise BadBundle(
            f"the model takes {have} values {list(model.input_shape)}, the manifest's input gives "
            f"{spec.rows} rows x {len(spec.columns)} {what} = {wanted}; correct [input] and pack it again"
        )
    labels, gives = len(output.labels), f"the model gives {model.outputs} outputs"
    binary = model.outputs == 1 and labels == 2 and not output.multi_label
    if content.kind == "classify" and model.outputs != labels and not binary:
        raise BadBundle(f"{gives}, the manifest names {labels} labels; name each class")
    if content.kind == "regress" and model.outputs != max(1, len(output.names)):
        told = "one value" if not output.names else f"the {len(output.names)} values of [output] names"
        raise BadBundle(f"{gives}, kind regress reports {told}; name each output in [output] names")
    if content.kind == "anomaly" and model.outputs not in (1, wanted):
        raise BadBundle(f"{gives}; kind anomaly needs one score, or its {wanted} inputs again")
    if content.kind == "embedding" and output.centroid and model.outputs != len(output.centroid):
        raise BadBundle(f"{gives}, the manifest's centroid has {len(output.centroid)}; pack it again")
    return f"{wanted} values in, {model.outputs} out"


def _sample_rows(model: TfliteModel, vectors: GoldenVectors | None, count: int) -> Floats:
    """Up to `count` golden inputs, or noise over the range of the input where there are none that fit."""
    import numpy as np

    if vectors is not None:
        found = vectors.inputs[:count]
        if len(found) >= _COMPARED_ROWS and found.size == len(found) * math.prod(model.input_shape):
            return found
    low, high = model.input_range
    return np.random.default_rng(0).uniform(low, high, (count, *model.input_shape)).astype(np.float32)


def _check_batching(model: TfliteModel, vectors: GoldenVectors | None) -> str:
    """The last row first, alone: what a model carries from row to row, or mixes between rows, comes out."""
    import numpy as np

    rows = _sample_rows(model, vectors, _COMPARED_ROWS)
    together = model.invoke(rows)
    alone = np.concatenate([model.invoke(rows[i : i + 1]) for i in reversed(range(len(rows)))])[::-1]
    off = float(np.abs(together - alone).max())
    allowed = model.output_step or 1e-4 * max(1.0, float(np.abs(alone).max()))
    if not off <= allowed:
        raise BadBundle(
            f"a row's answer depends on the rows before or beside it (off by {off:.4g}): the model keeps state or "
            "mixes the rows of a batch, so its results would depend on how readings are batched"
        )
    return f"{len(rows)} rows, alone and together: off by {off:.2g}"


def _tuning_failure(death_detail: str, limits: ResourceLimits) -> list[Check]:
    """That a large batch takes too much memory says nothing against the model, which ran; a crash does."""
    return [] if death_detail == _out_of_memory_detail(limits) else [("trial", False, death_detail)]


def _out_of_memory_detail(limits: ResourceLimits) -> str:
    return f"ran out of memory, it may have {limits.memory_mib} MiB ([limits] memory_mib)"


def describe_death(code: int, stderr: bytes, limits: ResourceLimits) -> str:
    """What a child process with a model died of."""
    said = stderr.decode(errors="replace").strip()
    if code == -signal.SIGXCPU:
        return f"used more than its {limits.seconds} s of CPU and was ended ([limits] seconds)"
    if "MemoryError" in said or "bad_alloc" in said or code == -signal.SIGKILL:
        return _out_of_memory_detail(limits)
    if code < 0:
        name = signal.Signals(-code).name
        return f"the runtime crashed on it ({name}); the model is damaged or not for this runtime"
    return f"the child process failed ({code}): {said[-300:]}"


def main() -> None:
    task = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=_ProbeRequest)
    if "manifest.json" in task.files:
        _probe_in_child(task)
    else:
        _inspect_in_child(task.files["model.tflite"])


def _probe_in_child(request: _ProbeRequest) -> None:
    limits = manifest.decode(request.files["manifest.json"]).limits
    memory = _apply_limits(limits)
    found = run_checks(request.files)
    # At once: what the trial then makes the runtime do must not take this along.
    sys.stdout.buffer.write(msgspec.json.encode((*found, _peak_memory())) + b"\n")
    sys.stdout.buffer.flush()
    if request.known_tunings is not None and all(ok for _, ok, _ in found[1]):
        _extend_cpu_limit(limits.seconds)
        sys.stdout.buffer.write(msgspec.json.encode(_tune(request.files, request.known_tunings, memory)))


def _inspect_in_child(content: bytes) -> None:
    from agent.model.inference import inspect

    _apply_limits(ResourceLimits())
    answer: ModelInspection | str
    try:
        answer = inspect.inspect_model(content)
    except BadBundle as problem:
        answer = str(problem)
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def _tune(files: dict[str, bytes], known_tunings: list[Tuning], memory: int) -> Tuning:
    from agent.model.bundle import golden_vectors
    from agent.model.inference import inference, runtime
    from agent.model.inference import tuning as choice
    from agent.model.sandbox import autotune

    spec, content = manifest.decode(files["manifest.json"]), files["model.tflite"]
    found = choice.find_known(known_tunings, content, runtime.RUNTIME_NAME, spec.output.tensor)
    if found is None:
        vectors = golden_vectors.decode(files["golden.npz"]) if "golden.npz" in files else None
        rows = _sample_rows(inference.load_model(spec, content), vectors, autotune.SAMPLE_ROWS)
        found = autotune.tune(content, rows, memory, output=spec.output.tensor)
    return found


def _apply_limits(limits: ResourceLimits) -> int:
    """Memory and CPU for the model, on top of what Python, numpy and the runtime took to start.

    Bytes that a larger batch may take: half of that memory, and no more than an eighth of what the machine has left.
    """
    import psutil

    import agent.model.bundle.golden_vectors
    import agent.model.sandbox.autotune  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + (limits.memory_mib << 20)
    cpu = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + limits.seconds
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return min(limits.memory_mib << 19, int(psutil.virtual_memory().available) // 8)


def _peak_memory() -> int:
    """Bytes resident at the most. Not of getrusage, which tells of the parent's where the child began as its copy."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _extend_cpu_limit(seconds: int) -> None:
    """Of CPU, for the trial: it may use every core."""
    used = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    allowed = used + seconds + math.ceil(MAX_TUNING_S) * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
