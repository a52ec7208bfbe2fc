"""Bundle supply: find a bundle on this device or fetch it, verify it and probe it.

Nothing here blocks the main loop: reading and probing run on a thread, a fetch is a process, and both are polled. A
bundle counts as proven once a copy of it is durable.
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

from outstation.device.bundles import history
from outstation.device.bundles.rollout_state import Reason
from outstation.device.config import Config
from outstation.device.rollout.state_machine import BundleAssessment
from outstation.foundation import input_files
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, ConfigError, OutstationError
from outstation.ml.model import activation
from outstation.ml.model.activation import ProvenBundle
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.sandbox.probe import ProbeReport
from outstation.protocol.wire.desired_state import DesiredBundle
from outstation.protocol.wire.keys import PublicKey

log = logging.getLogger("outstation.updates")

# A bundle that was missing, or did not fit, is searched again after this time.
SEARCH_RETRY_S = 3600.0
# Free disk that must remain after another bundle was stored.
_DISK_RESERVE_BYTES = 32 << 20
_MAX_SCANNED_ENTRIES = 64
_save_lock = threading.Lock()


class BundleRequest(msgspec.Struct, frozen=True):
    """A bundle that a task needs. It may be fetched only if it is `desired`."""

    task: str
    name: str
    version: str
    digest: str
    desired: DesiredBundle | None = None


class BundleFetcher(Protocol):
    """The part of `fetcher.Fetcher` that the supply uses."""

    def start(self, task: str, desired: DesiredBundle, now: ClockReading) -> None: ...
    def stop(self, task: str) -> None: ...


class BundleMissing(msgspec.Struct, frozen=True):
    """Result of a search: the bundle is not on this device."""


SearchResult = ProvenBundle | BundleAssessment | BundleMissing


class BundleSupply:
    """Supply of one task. `check_fit` raises ConfigError for a bundle that the task cannot run.

    `publishers` returns the keys that may sign bundles at this moment. `probe` probes a bundle for a task; `start_job`
    starts that, usually on a thread.

    `on_progress` is called by the job when `poll` may have a new result.
    """

    def __init__(
        self,
        conf: Config,
        publishers: Callable[[], Sequence[PublicKey]],
        fetcher: BundleFetcher | None,
        check_fit: Callable[[str, Bundle], None],
        probe: Callable[[str, Bundle], ProbeReport],
        start_job: Callable[[Callable[[], None]], object],
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._conf, self._publishers = conf, publishers
        self._fetcher, self._check_fit = fetcher, check_fit
        self._probe, self._start_job, self._on_progress = probe, start_job, on_progress
        self._request: BundleRequest | None = None
        self._job: _BackgroundJob | None = None
        self._fetching = False
        self._result: ProvenBundle | BundleAssessment | None = None
        self._retry_at_s = 0.0

    def poll(self, request: BundleRequest, now: ClockReading) -> ProvenBundle | BundleAssessment | None:
        """Return the bundle, or why there is none; None while unknown. The main loop polls repeatedly."""
        if request != self._request:
            self.cancel()
            self._request = request
        if isinstance(self._result, BundleAssessment) and not self._fetching and now.boot_s >= self._retry_at_s:
            self._result = None
        if self._result is None and not self._fetching:
            if self._job is None:
                self._job = self._start(lambda: self._find_and_verify(request))
            result = self._job.result
            if result is not None:
                self._job, self._retry_at_s = None, now.boot_s + SEARCH_RETRY_S
                if not isinstance(result, BundleMissing):
                    self._result = result
                elif self._fetcher is not None and request.desired is not None:
                    self._fetching = True
                    self._fetcher.start(request.task, request.desired, now)
                else:
                    cause = "its config has no [updates] to fetch it from" if request.desired else "its copy is gone"
                    detail = f"{request.name} {request.version} is not on this device, and {cause}"
                    self._result = BundleAssessment("download_failed", detail)
        return self._result

    def on_fetched(self, task: str, archive: Path) -> None:
        request = self._request
        if request is not None and self._fetching and request.task == task:
            self._fetching, self._result = False, None
            self._job = self._start(lambda: self._verify_archive(request, archive))

    def on_fetch_failed(self, task: str, assessment: BundleAssessment) -> None:
        """Record why the fetch failed; the fetcher keeps trying."""
        if self._request is not None and self._fetching and self._request.task == task:
            self._result = assessment

    def cancel(self) -> None:
        if self._fetching and self._fetcher is not None and self._request is not None:
            self._fetcher.stop(self._request.task)
        # A running thread ends by itself; its result is dropped.
        self._request, self._job, self._result, self._fetching = None, None, None, False

    def _start(self, action: Callable[[], SearchResult]) -> _BackgroundJob:
        job = _BackgroundJob(action, self._on_progress)
        self._start_job(job.run)
        return job

    # --- on the job's thread ---

    def _find_and_verify(self, request: BundleRequest) -> SearchResult:
        """Search this device. A damaged copy counts as missing: the bundle may still be fetched."""
        for path in self._candidate_paths(request):
            candidate = self._read_bundle(path, request)
            if isinstance(candidate, Bundle):
                return self._verify(request, candidate)
        return BundleMissing()

    def _verify_archive(self, request: BundleRequest, archive: Path) -> SearchResult:
        candidate = self._read_bundle(archive, request)
        if isinstance(candidate, BundleMissing):
            detail = f"the archive fetched as {request.name} {request.version} holds another bundle"
            return BundleAssessment("signature", detail)
        return self._verify(request, candidate) if isinstance(candidate, Bundle) else candidate

    def _verify(self, request: BundleRequest, candidate: Bundle) -> SearchResult:
        manifest = candidate.manifest
        if (manifest.name, manifest.version) != (request.name, request.version):
            detail = (
                f"the manifest of the bundle with this digest says {manifest.name} {manifest.version}, "
                f"{request.name} {request.version} is desired"
            )
            return BundleAssessment("signature", detail)
        return self._probe_and_save(request, candidate)

    def _candidate_paths(self, request: BundleRequest) -> Iterator[Path]:
        """Yield stored copies, configured and built-in bundles, and entries of the folder of bundles."""
        data = self._conf.data_dir
        yield history.copy_folder(data, request.digest)
        for name in dict.fromkeys((self._conf.tasks[request.task].bundle, request.name)):
            try:
                yield builtin.locate_bundle(name, data / "bundles")
            except BadBundle:
                continue
        home = data / "bundles"
        for entry in sorted(home.iterdir())[:_MAX_SCANNED_ENTRIES] if home.is_dir() else ():
            if not entry.name.startswith(".") and _may_have_digest(entry, request.digest):
                yield entry

    def _read_bundle(self, path: Path, request: BundleRequest) -> Bundle | BundleAssessment | BundleMissing:
        if not path.exists():
            return BundleMissing()
        try:
            candidate = bundle.read(path, [*self._publishers(), *builtin.publisher_keys()])
        except BadBundle as problem:
            return BundleAssessment("signature", str(problem))
        return candidate if candidate.digest == request.digest else BundleMissing()

    def _probe_and_save(self, request: BundleRequest, verified: Bundle) -> ProvenBundle | BundleAssessment:
        try:
            self._check_fit(request.task, verified)
            if not history.copy_folder(self._conf.data_dir, verified.digest).is_dir():
                size = sum(len(data) for data in verified.files.values())
                free = shutil.disk_usage(self._conf.data_dir).free
                if size + _DISK_RESERVE_BYTES > free:
                    raise BadBundle(
                        f"its {size / 2**20:.1f} MiB do not fit next to the active bundle: {free / 2**20:.1f} MiB are "
                        f"free, and {_DISK_RESERVE_BYTES >> 20} MiB of them must stay free; make room"
                    )
            report = self._probe(request.task, verified)
            for name, ok, detail in report.checks:
                if not ok:
                    return BundleAssessment(_reason_for_check(name, detail), f"{name}: {detail}", {"check": name})
            proven = ProvenBundle(verified, activation.read_reference(verified), report.tuning)
        except ConfigError as problem:
            return BundleAssessment("incompatible", problem.problem)
        except BadBundle as problem:
            return BundleAssessment("incompatible", str(problem))
        # Two tasks may obtain the same bundle at once.
        with _save_lock:
            is_stored = history.store_copy(verified, self._conf.data_dir)
        if not is_stored:
            return BundleAssessment("incompatible", "the disk has no room for a copy next to the active bundle")
        return proven


class _BackgroundJob:
    """An action that `run` runs, usually on a thread of its own. `result` is None until then."""

    def __init__(self, action: Callable[[], SearchResult], on_done: Callable[[], object]) -> None:
        self._action, self._on_done = action, on_done
        self.result: SearchResult | None = None

    def run(self) -> None:
        try:
            self.result = self._action()
        except OutstationError as problem:
            self.result = BundleAssessment("incompatible", str(problem))
        except Exception as error:
            # Unforeseen; without a result the main loop would wait for ever.
            log.exception("a bundle could not be verified")
            self.result = BundleAssessment("incompatible", f"{type(error).__name__}: {error}")
        self._on_done()


def _may_have_digest(path: Path, digest: str) -> bool:
    """Return True for a folder whose manifest has this digest, and for every archive."""
    if path.suffix == ".zip":
        return path.is_file()
    head = path / "manifest.json"
    try:
        if not head.is_file() or head.stat().st_size > bundle.MAX_BYTES:
            return False
        return f"sha256:{hashlib.sha256(input_files.read_bytes(head)).hexdigest()}" == digest
    except OSError:
        return False


def _reason_for_check(check: str, detail: str) -> Reason:
    if check in ("golden", "batch"):
        return "golden_vectors"
    if "crashed" in detail:
        return "crash"
    return "hang" if "did not finish" in detail or "of CPU" in detail else "incompatible"
