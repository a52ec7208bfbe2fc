"""Load a bundle and run its golden vectors in a child process: a bad model may crash, and then only the child dies.

Checks, each only where those before it passed:
- load: the runtime takes the model, it has one input, the output that is named, and keeps no state
- shapes: it takes what the manifest's input gives, and gives what the manifest's kind needs
- batch: rows in a batch get the answers they get alone, in any order
- golden: the golden vectors come out as published
"""

from __future__ import annotations

import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.errors import BadBundle
from agent.model import manifest
from agent.model.bundle import Bundle
from agent.model.manifest import Limits, Manifest
from agent.model.outline import Outline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agent.model.golden import Golden
    from agent.model.runtime import Model

    Floats = NDArray[np.float32]

# On top of the bundle's own seconds of CPU: starting Python takes some on a small board, and waiting takes no CPU.
GRACE_S = 10.0
_FEW = 5  # rows that are compared alone and together; more than a batch of single rows
Check = tuple[str, bool, str]


@dataclass(frozen=True, slots=True)
class Report:
    """What the child saw; `checks` are (name, ok, detail)."""

    runtime: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(ok for _, ok, _ in self.checks)

    def require(self) -> None:
        """Raises BadBundle with the check that failed."""
        for name, ok, detail in self.checks:
            if not ok:
                raise BadBundle(f"{name}: {detail}")


def probe(bundle: Bundle) -> Report:
    """Run the checks on the verified bytes of `bundle`, within its limits of memory and time."""
    wanted: tuple[str, ...] = ("manifest.json", "model.tflite", "golden.npz")
    files = {name: bundle.files[name] for name in wanted if name in bundle.files}
    try:
        runtime, checks = msgspec.json.decode(_ask(files, bundle.manifest.limits), type=tuple[str, list[Check]])
        return Report(runtime, checks)
    except BadBundle as problem:
        return Report("", [("load", False, str(problem))])
    except msgspec.MsgspecError as error:
        return Report("", [("load", False, f"the child process answered something else ({error})")])


def look(content: bytes) -> Outline:
    """What a model says of itself, and what it answers to noise. Raises BadBundle where it cannot be run here."""
    said = _ask({"model.tflite": content}, Limits())
    found = msgspec.json.decode(said, type=Outline | str)
    if isinstance(found, str):
        raise BadBundle(found)
    return found


def _ask(files: dict[str, bytes], limits: Limits) -> bytes:
    """What the child says of these files. Raises BadBundle where it dies."""
    try:
        child = subprocess.run(
            # -P: an `agent` in the folder it happens to run in is not ours.
            [sys.executable, "-P", "-m", "agent.model.probe"],
            input=msgspec.msgpack.encode(files),
            capture_output=True,
            timeout=limits.seconds + GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadBundle(f"did not finish within {limits.seconds + GRACE_S:g} s and was ended") from None
    if child.returncode != 0:
        raise BadBundle(_death(child.returncode, child.stderr, limits))
    return child.stdout


def check(files: dict[str, bytes]) -> tuple[str, list[Check]]:
    """What the child does."""
    from agent.model import golden, inference, runtime

    content = manifest.decode(files["manifest.json"])
    checks: list[Check] = []

    def step(name: str, action: Callable[[], str]) -> bool:
        try:
            checks.append((name, True, action()))
        except BadBundle as problem:
            checks.append((name, False, str(problem)))
        return checks[-1][1]

    try:
        model = inference.load(content, files["model.tflite"])
        checks.append(("load", True, f"{len(files['model.tflite'])} bytes, {_batches(model)}"))
        vectors = golden.decode(files["golden.npz"]) if "golden.npz" in files else None
    except BadBundle as problem:
        checks.append(("golden" if checks else "load", False, str(problem)))
        return runtime.NAME, checks
    sound = step("shapes", lambda: _shapes(model, content)) and step("batch", lambda: _batch(model, vectors))
    if sound and vectors is not None:
        classes = content.kind == "classify" and not content.output.multi_label
        step("golden", lambda: vectors.compare(model.invoke(vectors.inputs), runtime.NAME, classes=classes))
    return runtime.NAME, checks


def _batches(model: Model) -> str:
    return f"batches of {model.batch}" if model.batch > 1 else "one row at a time"


def _shapes(model: Model, content: Manifest) -> str:
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


def _rows(model: Model, vectors: Golden | None) -> Floats:
    """A few golden inputs, or noise over the range of the input where there are none that fit."""
    import numpy as np

    shape = (_FEW, *model.input_shape)
    if vectors is not None and vectors.inputs[:_FEW].size == math.prod(shape):
        return vectors.inputs[:_FEW]
    low, high = model.input_range
    return np.random.default_rng(0).uniform(low, high, shape).astype(np.float32)


def _batch(model: Model, vectors: Golden | None) -> str:
    """The last row first, alone: what a model carries from row to row, or mixes between rows, comes out."""
    import numpy as np

    rows = _rows(model, vectors)
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


def _death(code: int, stderr: bytes, limits: Limits) -> str:
    said = stderr.decode(errors="replace").strip()
    if code == -signal.SIGXCPU:
        return f"used more than its {limits.seconds} s of CPU and was ended ([limits] seconds)"
    if "MemoryError" in said or "bad_alloc" in said or code == -signal.SIGKILL:
        return f"ran out of memory, it may have {limits.memory_mib} MiB ([limits] memory_mib)"
    if code < 0:
        name = signal.Signals(-code).name
        return f"the runtime crashed on it ({name}); the model is damaged or not for this runtime"
    return f"the child process failed ({code}): {said[-300:]}"


def main() -> None:
    files = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=dict[str, bytes])
    if "manifest.json" in files:
        _limit(manifest.decode(files["manifest.json"]).limits)
        answer: object = check(files)
    else:
        from agent.model import outline

        _limit(Limits())
        try:
            answer = outline.of(files["model.tflite"])
        except BadBundle as problem:
            answer = str(problem)
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def _limit(limits: Limits) -> None:
    """Memory and CPU for the model, on top of what Python, numpy and the runtime took to start."""
    import agent.model.golden
    import agent.model.runtime  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + (limits.memory_mib << 20)
    cpu = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + limits.seconds
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
