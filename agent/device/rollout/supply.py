"""How a bundle comes to be here and proves itself: looked for on this device, fetched, verified and probed.

Nothing here takes the main loop's time: files are read and the probe's child is waited for on a thread, a fetch is a
process of its own, and both are polled. A bundle that proved itself is kept as a copy, on the disk, before it counts.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent.clock import Now
from agent.config import Config
from agent.device.bundles import history
from agent.device.bundles.rollout_state import Reason
from agent.device.rollout.state_machine import Finding
from agent.errors import BadBundle, ConfigError, OutstationError
from agent.model import activation
from agent.model.activation import Proved
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import Bundle
from agent.model.inference.tuning import Choice
from agent.model.sandbox import probe
from agent.wire.desired_state import Wanted
from agent.wire.keys import PublicKey

log = logging.getLogger("outstation.updates")

# So long after a bundle did not come, or did not fit, it is looked for again.
RETRY_S = 3600.0
# What must stay free of the disk when another bundle was kept.
_SPARE = 32 << 20
_MOST_LAID = 64
_keeping = threading.Lock()


class Sought(msgspec.Struct, frozen=True):
    """A bundle that should be here, for a task; fetched only where it is `wanted`."""

    task: str
    name: str
    version: str
    digest: str
    wanted: Wanted | None = None


class Fetches(Protocol):
    """What this uses of a `fetching.Fetcher`."""

    def start(self, task: str, wanted: Wanted, now: Now) -> None: ...
    def stop(self, task: str) -> None: ...


class Missing(msgspec.Struct, frozen=True):
    """It is nowhere here."""


class Supply:
    """Of one task. `fits` raises ConfigError where a bundle cannot be run for the task; `known`: choices made before.

    `stirred` is called, on another thread, when it is worth to ask again.
    """

    def __init__(
        self,
        conf: Config,
        publishers: Sequence[PublicKey],
        fetches: Fetches | None,
        fits: Callable[[str, Bundle], None],
        known: Callable[[str], Sequence[Choice]],
        stirred: Callable[[], object] = lambda: None,
    ) -> None:
        self._conf, self._publishers = conf, [*publishers, *builtin.publishers()]
        self._fetches, self._fits, self._known, self._stirred = fetches, fits, known, stirred
        self._sought: Sought | None = None
        self._job: _Job | None = None
        self._fetching = False
        self._found: Proved | Finding | None = None
        self._again_s = 0.0

    def seek(self, sought: Sought, now: Now) -> Proved | Finding | None:
        """The bundle, or why there is none; None while that is not known. Asked again and again by the main loop."""
        if sought != self._sought:
            self.drop()
            self._sought = sought
        if isinstance(self._found, Finding) and not self._fetching and now.boot_s >= self._again_s:
            self._found = None
        if self._found is None and not self._fetching:
            self._look(sought, now)
        return self._found

    def came(self, task: str, archive: Path) -> None:
        """What was fetched is on the disk."""
        if (sought := self._sought) is not None and self._fetching and sought.task == task:
            self._fetching, self._found = False, None
            self._job = _Job(lambda: self._prove(sought, archive), self._stirred)

    def failed(self, task: str, finding: Finding) -> None:
        """It did not come; it is still tried to fetch it."""
        if self._sought is not None and self._fetching and self._sought.task == task:
            self._found = finding

    def drop(self) -> None:
        """Nothing is sought any more."""
        if self._fetching and self._fetches is not None and self._sought is not None:
            self._fetches.stop(self._sought.task)
        # A thread that still waits for its child ends by itself; what it finds is of no interest.
        self._sought, self._job, self._found, self._fetching = None, None, None, False

    def _look(self, sought: Sought, now: Now) -> None:
        if self._job is None:
            self._job = _Job(lambda: self._prove(sought, None), self._stirred)
        found = self._job.result()
        if found is None:
            return
        self._job, self._again_s = None, now.boot_s + RETRY_S
        if not isinstance(found, Missing):
            self._found = found
        elif self._fetches is None or sought.wanted is None:
            whole = "its config has no [updates] to fetch it from" if sought.wanted else "it was kept here, and is gone"
            self._found = Finding("fetch", f"{sought.name} {sought.version} is not on this device, and {whole}")
        else:
            self._fetching = True
            self._fetches.start(sought.task, sought.wanted, now)

    # --- on the job's thread ---

    def _prove(self, sought: Sought, archive: Path | None) -> Proved | Finding | Missing:
        found: Bundle | Finding | Missing = Missing()
        for path in self._places(sought) if archive is None else (archive,):
            found = self._read(path, sought)
            if isinstance(found, Bundle):
                break
        if isinstance(found, Missing) and archive is not None:
            return Finding("signature", f"what was fetched as {sought.name} {sought.version} is another bundle")
        # A damaged copy here is no reason not to fetch it.
        if isinstance(found, Bundle) and (found.manifest.name, found.manifest.version) != (sought.name, sought.version):
            called = f"{found.manifest.name} {found.manifest.version}"
            why = f"the bundle of this digest is {called} by its manifest, {sought.name} {sought.version} is desired"
            return Finding("signature", why)
        if not isinstance(found, Bundle):
            return found if archive is not None else Missing()
        return self._checked(sought, found)

    def _places(self, sought: Sought) -> Iterator[Path]:
        """Kept copies, what is configured or ships, and whatever somebody laid into the folder of bundles."""
        data = self._conf.data_dir
        yield history.folder(data, sought.digest)
        for name in dict.fromkeys((self._conf.tasks[sought.task].bundle, sought.name)):
            try:
                yield builtin.locate(name, data / "bundles")
            except BadBundle:
                continue
        home = data / "bundles"
        for entry in sorted(home.iterdir())[:_MOST_LAID] if home.is_dir() else ():
            if not entry.name.startswith(".") and _claims(entry, sought.digest):
                yield entry

    def _read(self, path: Path, sought: Sought) -> Bundle | Finding | Missing:
        if not path.exists():
            return Missing()
        try:
            found = bundle.read(path, self._publishers)
        except BadBundle as problem:
            return Finding("signature", str(problem))
        return found if found.digest == sought.digest else Missing()

    def _checked(self, sought: Sought, found: Bundle) -> Proved | Finding:
        try:
            self._fits(sought.task, found)
            self._require_room(found)
            report = probe.probe(found, list(self._known(sought.task)))
            for name, ok, detail in report.checks:
                if not ok:
                    return Finding(_reason(name, detail), f"{name}: {detail}", {"check": name})
            proved = Proved(found, activation.reference(found), report.choice)
        except ConfigError as problem:
            return Finding("unfit", problem.problem)
        except BadBundle as problem:
            return Finding("unfit", str(problem))
        # Two tasks may come to the same bundle at once.
        with _keeping:
            kept_here = history.keep(found, self._conf.data_dir)
        if not kept_here:
            return Finding("unfit", "the disk does not take a copy of it beside the one that runs")
        return proved

    def _require_room(self, found: Bundle) -> None:
        """Two bundles are kept while both may be needed. Raises BadBundle."""
        if history.folder(self._conf.data_dir, found.digest).is_dir():
            return
        size = sum(len(data) for data in found.files.values())
        free = shutil.disk_usage(self._conf.data_dir).free
        if size + _SPARE > free:
            raise BadBundle(
                f"its {size / 2**20:.1f} MiB do not fit beside the bundle that runs: {free / 2**20:.1f} MiB are free "
                f"here, {_SPARE >> 20} MiB must stay so; make room"
            )


class _Job:
    """Something that is waited for on a thread of its own."""

    def __init__(self, do: Callable[[], Proved | Finding | Missing], done: Callable[[], object]) -> None:
        self._do, self._done = do, done
        self._result: Proved | Finding | Missing | None = None
        threading.Thread(target=self._run, name="proving", daemon=True).start()

    def result(self) -> Proved | Finding | Missing | None:
        """None while it is at work."""
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._do()
        except OutstationError as problem:
            self._result = Finding("unfit", str(problem))
        except Exception as error:
            # Nobody foresaw it; the daemon must not wait for an answer for ever.
            log.exception("a bundle could not be proved")
            self._result = Finding("unfit", f"{type(error).__name__}: {error}")
        self._done()


def _claims(path: Path, digest: str) -> bool:
    """Whether what lies there says that it is the bundle; archives are looked into."""
    if path.suffix == ".zip":
        return path.is_file()
    head = path / "manifest.json"
    try:
        if not head.is_file() or head.stat().st_size > bundle.MAX_BYTES:
            return False
        return f"sha256:{hashlib.sha256(head.read_bytes()).hexdigest()}" == digest
    except OSError:
        return False


def _reason(check: str, detail: str) -> Reason:
    if check in ("golden", "batch"):
        return "golden"
    if "crashed" in detail:
        return "crash"
    return "hang" if "did not finish" in detail or "of CPU" in detail else "unfit"
