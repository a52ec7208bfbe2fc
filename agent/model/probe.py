"""Load a bundle and run its golden vectors in a child process: a bad model may crash, and then only the child dies."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.errors import BadBundle
from agent.model import manifest
from agent.model.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Report:
    """What the child saw; `checks` are (name, ok, detail)."""

    runtime: str
    checks: list[tuple[str, bool, str]]

    @property
    def ok(self) -> bool:
        return all(ok for _, ok, _ in self.checks)


def probe(bundle: Bundle) -> Report:
    """Run the checks on the verified bytes of `bundle`, within its limits of memory and time."""
    limits = bundle.manifest.limits
    files = {
        name: bundle.files[name] for name in ("manifest.json", "model.tflite", "golden.npz") if name in bundle.files
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "agent.model.probe"],
            input=msgspec.msgpack.encode(files),
            capture_output=True,
            timeout=limits.seconds + 10,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Report("", [("load", False, f"did not finish within {limits.seconds + 10} s and was ended")])
    try:
        runtime, checks = msgspec.json.decode(child.stdout, type=tuple[str, list[tuple[str, bool, str]]])
        return Report(runtime, checks)
    except msgspec.MsgspecError:
        return Report("", [("load", False, _death(child.returncode, child.stderr))])


def check(files: dict[str, bytes]) -> tuple[str, list[tuple[str, bool, str]]]:
    """What the child does: load, compare the shapes with the manifest, run the golden vectors."""
    from agent.model import golden, runtime

    checks: list[tuple[str, bool, str]] = []

    def step(name: str, action: Any) -> bool:
        try:
            checks.append((name, True, str(action())))
        except BadBundle as problem:
            checks.append((name, False, str(problem)))
        return checks[-1][1]

    content = manifest.decode(files["manifest.json"])
    loaded: list[runtime.Model] = []
    if not step("load", lambda: _load(files["model.tflite"], loaded)):
        return runtime.NAME, checks
    if step("shapes", lambda: _shapes(loaded[0], content)):
        if "golden.npz" in files:
            step("golden", lambda: _golden(loaded[0], golden.decode(files["golden.npz"]), runtime.NAME))
        else:
            step("invoke", lambda: _zeros(loaded[0]))
    return runtime.NAME, checks


def _load(content: bytes, into: list[Any]) -> str:
    from agent.model.runtime import Model

    into.append(Model(content))
    return f"{len(content)} bytes, batch {into[0].batch}"


def _shapes(model: Any, content: manifest.Manifest) -> str:
    spec = content.input
    rows = spec.window.rows if spec.window else 1
    wanted, have = rows * len(spec.fields), 1
    for dimension in model.input_shape:
        have *= dimension
    if wanted != have:
        raise BadBundle(
            f"the model takes {have} values {list(model.input_shape)}, the manifest's input gives "
            f"{rows} rows x {len(spec.fields)} fields = {wanted}; correct [input] and pack it again"
        )
    labels = len(content.output.labels)
    if content.kind == "classify" and model.outputs != labels and not (model.outputs == 1 and labels == 2):
        raise BadBundle(f"the model gives {model.outputs} outputs, the manifest names {labels} labels")
    return f"{wanted} values in, {model.outputs} out"


def _golden(model: Any, vectors: Any, runtime: str) -> str:
    return str(vectors.compare(model.invoke(vectors.inputs), runtime))


def _zeros(model: Any) -> str:
    import numpy as np

    model.invoke(np.zeros((model.batch, *model.input_shape), np.float32))
    return "no golden vectors; zeros ran"


def _death(code: int, stderr: bytes) -> str:
    import signal

    if code < 0:
        return f"the runtime crashed on it ({signal.Signals(-code).name}); the model is damaged or not for this runtime"
    return f"the child process failed ({code}): {stderr.decode(errors='replace').strip()[-300:]}"


def main() -> None:
    files = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=dict[str, bytes])
    limits = manifest.decode(files["manifest.json"]).limits
    memory = limits.memory_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(msgspec.json.encode(check(files)))


if __name__ == "__main__":
    main()
