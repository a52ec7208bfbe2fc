"""Facts for a task's next step: the desired bundle, the running one, and whether the needed bundle is ready."""

from __future__ import annotations

from msgspec.structs import replace

from outstation.device.bundles import history, overrides
from outstation.device.bundles.history import BundleHistory
from outstation.device.bundles.rollout_state import RolloutState
from outstation.device.config import Config
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.rollout.serving import ServingManager, TaskRollout
from outstation.device.rollout.state_machine import BundleAssessment, RolloutFacts, select_target_digest
from outstation.device.rollout.supply import BundleRequest
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.ml.model.activation import ProvenBundle
from outstation.protocol.wire.desired_state import DesiredBundle


class FactCollector:
    def __init__(
        self, conf: Config, store: Store, device: str, desired_state: DesiredStateStore, serving: ServingManager
    ) -> None:
        self._conf, self._store, self._device = conf, store, device
        self._desired_state, self._serving = desired_state, serving

    def collect(self, rollout: TaskRollout, now: ClockReading) -> RolloutFacts:
        """Return the facts, and continue to obtain the bundle that the next step needs."""
        name, old, uptime_s = rollout.name, rollout.state, self._store.uptime_s(now)
        desired = self._desired_state.find_desired(name)
        subject = desired if desired is not None or old is None else old.desired
        hold_off = rollout.hold_offs.get(subject.digest) if subject else None
        past = history.load_history(self._store, name)
        facts = RolloutFacts(
            device=self._device,
            desired=desired,
            running_digest=self._serving.find_running_digest(rollout),
            configured_digest=rollout.configured_digest,
            timestamp=clock.to_rfc3339(now.wall_us),
            uptime_s=uptime_s,
            hold_off=hold_off if hold_off is not None and hold_off.until_s > uptime_s else None,
            fallback_digest=self._fallback_digest(name, past),
            quarantine_reason=self._quarantine_reason(name, old),
            is_deadline_passed=_is_deadline_passed(subject, now),
        )
        if rollout.canary is not None and old is not None:
            hours = (uptime_s - old.since_s) / 3600
            failure, completion = rollout.canary.check_failure(), rollout.canary.check_completion(hours)
            facts = replace(facts, failure=failure, completion=completion)
        return replace(facts, readiness=self._check_readiness(rollout, facts, past, now))

    def _check_readiness(
        self, rollout: TaskRollout, facts: RolloutFacts, past: BundleHistory | None, now: ClockReading
    ) -> BundleAssessment | None:
        """Return if the bundle of the next step is present and verified; None while unknown."""
        digest, old = select_target_digest(rollout.state, facts), rollout.state
        if not digest or old is None:
            rollout.supply.cancel()
            rollout.proven = rollout.load_failure = None
            return None
        if rollout.load_failure is not None:
            return rollout.load_failure
        if rollout.canary is not None and rollout.canary.candidate.bundle.digest == digest:
            return None
        # A canary that has to be restarted is not downloaded again: the task would wait for it.
        request = _make_bundle_request(rollout.name, digest, old.desired, past, may_fetch=old.phase != "canary")
        result = rollout.supply.poll(request, now)
        rollout.proven = result if isinstance(result, ProvenBundle) else None
        if isinstance(result, ProvenBundle):
            golden = " and its golden vectors match" if "golden.npz" in result.bundle.files else ""
            return BundleAssessment("", f"it was verified and run on this machine{golden}")
        return result

    def _fallback_digest(self, name: str, past: BundleHistory | None) -> str:
        previous = past.previous if past is not None else None
        if previous is None or not history.copy_folder(self._conf.data_dir, previous.digest).is_dir():
            return ""
        return "" if previous.digest in overrides.load_quarantined(self._store, name) else previous.digest

    def _quarantine_reason(self, name: str, old: RolloutState | None) -> str:
        if old is None or old.phase != "active":
            return ""
        quarantined = overrides.load_quarantined(self._store, name).get(old.desired.digest)
        return "" if quarantined is None else quarantined.reason


def _make_bundle_request(
    name: str, digest: str, desired: DesiredBundle, past: BundleHistory | None, *, may_fetch: bool
) -> BundleRequest:
    if digest == desired.digest:
        return BundleRequest(name, desired.bundle, desired.version, digest, desired if may_fetch else None)
    previous = past.previous if past is not None else None
    return BundleRequest(name, previous.name if previous else "", previous.version if previous else "", digest)


def _is_deadline_passed(desired: DesiredBundle | None, now: ClockReading) -> bool | None:
    """Return if the deadline has passed; None while the clock is unsynced."""
    if desired is None or desired.deadline is None:
        return False
    return None if now.quality == "unsynced" else now.wall_us >= clock.parse_rfc3339(desired.deadline)
