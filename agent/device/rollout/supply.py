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

from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles import history
from agent.device.bundles.rollout_state import Reason
from agent.device.rollout.state_machine import BundleAssessment
from agent.errors import BadBundle, ConfigError, OutstationError
from agent.model import activation
from agent.model.activation import ProvenBundle
from agent.model.bundle import builtin, bundle
from agent.model.bundle.bundle import Bundle
from agent.model.inference.tuning import Tuning
from agent.model.sandbox import probe
from agent.wire.desired_state import DesiredBundle
from agent.wire.keys import PublicKey

log = logging.getLogger("outstation.updates")

# So long after a bundle did not come, or did not fit, it is looked for again.
SEARCH_RETRY_S = 3600.0
# What must stay free of the disk when another bundle was kept.
_DISK_RESERVE_BYTES = 32 << 20
_MAX_SCANNED_ENTRIES = 64
_save_lock = threading.Lock()


class BundleRequest(msgspec.Struct, frozen=True):
    """A bundle that should be here, for a task; fetched only where it is `wanted`."""

    task: str
    name: str
    version: str
    digest: str
    desired: DesiredBundle | None = None


class BundleFetcher(Protocol):
    """What this uses of a `fetching.Fetcher`."""

    def start(self, task: str, desired: DesiredBundle, now: ClockReading) -> None: ...
    def stop(self, task: str) -> None: ...


class BundleMissing(msgspec.Struct, frozen=True):
    """It is nowhere here."""


class BundleSupply:
    """Of one task. `fits` raises ConfigError where a bundle cannot be run for the task; `known`: choices made before.

    `stirred` is called, on another thread, when it is worth to ask again.
    """

    def __init__(
        self,
        conf: Config,
        publishers: Sequence[PublicKey],
        fetcher: BundleFetcher | None,
        check_fit: Callable[[str, Bundle], None],
        known_tunings: Callable[[str], Sequence[Tuning]],
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._conf, self._publishers = conf, [*publishers, *builtin.publisher_keys()]
        self._fetcher, self._check_fit, self._known_tunings, self._on_progress = (
            fetcher,
            check_fit,
            known_tunings,
            on_progress,
        )
        self._request: BundleRequest | None = None
        self._job: _BackgroundJob | None = None
        self._fetching = False
        self._result: ProvenBundle | BundleAssessment | None = None
        self._retry_at_s = 0.0

    def poll(self, request: BundleRequest, now: ClockReading) -> ProvenBundle | BundleAssessment | None:
        """The bundle, or why there is none; None while that is not known. Asked again and again by the main loop."""
        if request != self._request:
            self.cancel()
            self._request = request
        if isinstance(self._result, BundleAssessment) and not self._fetching and now.boot_s >= self._retry_at_s:
            self._result = None
        if self._result is None and not self._fetching:
            self._search(request, now)
        return self._result

    def on_fetched(self, task: str, archive: Path) -> None:
        """What was fetched is on the disk."""
        if (sought := self._request) is not None and self._fetching and sought.task == task:
            self._fetching, self._result = False, None
            self._job = _BackgroundJob(lambda: self._find_and_verify(sought, archive), self._on_progress)

    def on_fetch_failed(self, task: str, assessment: BundleAssessment) -> None:
        """It did not come; it is still tried to fetch it."""
        if self._request is not None and self._fetching and self._request.task == task:
            self._result = assessment

    def cancel(self) -> None:
        """Nothing is sought any more."""
        if self._fetching and self._fetcher is not None and self._request is not None:
            self._fetcher.stop(self._request.task)
        # A thread that still waits for its child ends by itself; what it finds is of no interest.
        self._request, self._job, self._result, self._fetching = None, None, None, False

    def _search(self, request: BundleRequest, now: ClockReading) -> None:
        if self._job is None:
            self._job = _BackgroundJob(lambda: self._find_and_verify(request, None), self._on_progress)
        found = self._job.result()
        if found is None:
            return
        self._job, self._retry_at_s = None, now.boot_s + SEARCH_RETRY_S
        if not isinstance(found, BundleMissing):
            self._result = found
        elif self._fetcher is None or request.desired is None:
            whole = (
                "its config has no [updates] to fetch it from" if request.desired else "it was kept here, and is gone"
            )
            self._result = BundleAssessment(
                "download_failed", f"{request.name} {request.version} is not on this device, and {whole}"
            )
        else:
            self._fetching = True
            self._fetcher.start(request.task, request.desired, now)

    # --- on the job's thread ---

    def _find_and_verify(
        self, request: BundleRequest, archive: Path | None
    ) -> ProvenBundle | BundleAssessment | BundleMissing:
        found: Bundle | BundleAssessment | BundleMissing = BundleMissing()
        for path in self._candidate_paths(request) if archive is None else (archive,):
            found = self._read_bundle(path, request)
            if isinstance(found, Bundle):
                break
        if isinstance(found, BundleMissing) and archive is not None:
            return BundleAssessment(
                "signature", f"what was fetched as {request.name} {request.version} is another bundle"
            )
        # A damaged copy here is no reason not to fetch it.
        if isinstance(found, Bundle) and (found.manifest.name, found.manifest.version) != (
            request.name,
            request.version,
        ):
            called = f"{found.manifest.name} {found.manifest.version}"
            why = f"the bundle of this digest is {called} by its manifest, {request.name} {request.version} is desired"
            return BundleAssessment("signature", why)
        if not isinstance(found, Bundle):
            return found if archive is not None else BundleMissing()
        return self._probe_and_save(request, found)

    def _candidate_paths(self, request: BundleRequest) -> Iterator[Path]:
        """Kept copies, what is configured or ships, and whatever somebody laid into the folder of bundles."""
        data = self._conf.data_dir
        yield history.copy_folder(data, request.digest)
        for name in dict.fromkeys((self._conf.tasks[request.task].bundle, request.name)):
            try:
                yield builtin.locate_bundle(name, data / "bundles")
            except BadBundle:
                continue
        home = data / "bundles"
        for entry in sorted(home.iterdir())[:_MAX_SCANNED_ENTRIES] if home.is_dir() else ():
            if not entry.name.startswith(".") and _has_digest(entry, request.digest):
                yield entry

    def _read_bundle(self, path: Path, request: BundleRequest) -> Bundle | BundleAssessment | BundleMissing:
        if not path.exists():
            return BundleMissing()
        try:
            found = bundle.read(path, self._publishers)
        except BadBundle as problem:
            return BundleAssessment("signature", str(problem))
        return found if found.digest == request.digest else BundleMissing()

    def _probe_and_save(self, request: BundleRequest, verified: Bundle) -> ProvenBundle | BundleAssessment:
        try:
            self._check_fit(request.task, verified)
            self._require_disk_space(verified)
            report = probe.probe(verified, list(self._known_tunings(request.task)))
            for name, ok, detail in report.checks:
                if not ok:
                    return BundleAssessment(_reason_for_check(name, detail), f"{name}: {detail}", {"check": name})
            proved = ProvenBundle(verified, activation.read_reference(verified), report.tuning)
        except ConfigError as problem:
            return BundleAssessment("incompatible", problem.problem)
        except BadBundle as problem:
            return BundleAssessment("incompatible", str(problem))
        # Two tasks may come to the same bundle at once.
        with _save_lock:
            kept_here = history.store_copy(verified, self._conf.data_dir)
        if not kept_here:
            return BundleAssessment("incompatible", "the disk does not take a copy of it beside the one that runs")
        return proved

    def _require_disk_space(self, verified: Bundle) -> None:
        """Two bundles are kept while both may be needed. Raises BadBundle."""
        if history.copy_folder(self._conf.data_dir, verified.digest).is_dir():
            return
        size = sum(len(data) for data in verified.files.values())
        free = shutil.disk_usage(self._conf.data_dir).free
        if size + _DISK_RESERVE_BYTES > free:
            raise BadBundle(
                f"its {size / 2**20:.1f} MiB do not fit beside the bundle that runs: {free / 2**20:.1f} MiB are free "
                f"here, {_DISK_RESERVE_BYTES >> 20} MiB must stay so; make room"
            )


class _BackgroundJob:
    """Something that is waited for on a thread of its own."""

    def __init__(
        self, action: Callable[[], ProvenBundle | BundleAssessment | BundleMissing], on_done: Callable[[], object]
    ) -> None:
        self._action, self._on_done = action, on_done
        self._result: ProvenBundle | BundleAssessment | BundleMissing | None = None
        threading.Thread(target=self._run, name="proving", daemon=True).start()

    def result(self) -> ProvenBundle | BundleAssessment | BundleMissing | None:
        """None while it is at work."""
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._action()
        except OutstationError as problem:
            self._result = BundleAssessment("incompatible", str(problem))
        except Exception as error:
            # Nobody foresaw it; the daemon must not wait for an answer for ever.
            log.exception("a bundle could not be proved")
            self._result = BundleAssessment("incompatible", f"{type(error).__name__}: {error}")
        self._on_done()


def _has_digest(path: Path, digest: str) -> bool:
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


def _reason_for_check(check: str, detail: str) -> Reason:
    if check in ("golden_vectors", "batch"):
        return "golden_vectors"
    if "crashed" in detail:
        return "crash"
    return "hang" if "did not finish" in detail or "of CPU" in detail else "incompatible"
