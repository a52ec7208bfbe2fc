"""What there is for a task's next step: what is desired, what runs, and whether the bundle in question is here."""

from __future__ import annotations

from msgspec.structs import replace

from agent import clock
from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles import history, overrides
from agent.device.bundles.rollout_state import RolloutState
from agent.device.rollout.desired_state import DesiredStateStore
from agent.device.rollout.serving import ServingManager, TaskRollout
from agent.device.rollout.state_machine import BundleAssessment, RolloutFacts, select_target_digest
from agent.device.rollout.supply import BundleRequest
from agent.device.store import retention
from agent.device.store.store import Store
from agent.model.activation import ProvenBundle
from agent.wire.desired_state import DesiredBundle


class FactCollector:
    """Of one device."""

    def __init__(
        self, conf: Config, store: Store, device: str, desired_state: DesiredStateStore, serving: ServingManager
    ) -> None:
        self._conf, self._store, self._device, self._desired_state, self._serving = (
            conf,
            store,
            device,
            desired_state,
            serving,
        )

    def collect(self, rollout: TaskRollout, now: ClockReading) -> RolloutFacts:
        """All there is, and goes on with seeking the bundle that the next step needs."""
        name, old, at_s = rollout.name, rollout.state, self.uptime_s(now)
        wanted = self._desired_state.find_desired(name)
        about = wanted if wanted is not None or old is None else old.desired
        held = rollout.hold_offs.get(about.digest) if about else None
        past = history.load_history(self._store, name)
        facts = RolloutFacts(
            device=self._device,
            desired=wanted,
            running_digest=self._serving.find_running_digest(rollout),
            configured_digest=rollout.configured_digest,
            timestamp=clock.to_rfc3339(now.wall_us),
            uptime_s=at_s,
            hold_off=held if held is not None and held.until_s > at_s else None,
            fallback_digest=self._fallback_digest(name, past),
            quarantine_reason=self._quarantine_reason(name, old),
            is_deadline_passed=_is_deadline_passed(about, now),
        )
        if rollout.canary is not None and old is not None:
            hours = (at_s - old.since_s) / 3600
            facts = replace(
                facts, failure=rollout.canary.check_failure(), completion=rollout.canary.check_completion(hours)
            )
        return replace(facts, readiness=self._check_readiness(rollout, facts, past, now))

    def _check_readiness(
        self, rollout: TaskRollout, facts: RolloutFacts, past: history.BundleHistory | None, now: ClockReading
    ) -> BundleAssessment | None:
        """Whether the bundle that the next step needs is here and proved; goes on with that."""
        digest, old = select_target_digest(rollout.state, facts), rollout.state
        if not digest or old is None:
            rollout.supply.cancel()
            rollout.proven = rollout.load_failure = None
            return None
        if rollout.load_failure is not None:
            return rollout.load_failure
        if rollout.canary is not None and rollout.canary.candidate.bundle.digest == digest:
            return None
        # What answers already is not waited for from afar.
        fetched = old.phase != "canary"
        found = rollout.supply.poll(
            _make_bundle_request(rollout.name, digest, old.desired, past, may_fetch=fetched), now
        )
        rollout.proven = found if isinstance(found, ProvenBundle) else None
        if isinstance(found, ProvenBundle):
            return BundleAssessment("", _describe_proof(found))
        return found

    def uptime_s(self, now: ClockReading) -> float:
        """Seconds that the device was on."""
        return retention.uptime_s(self._store.get_meta(retention.UPTIME, ""), self._store.boot, now)

    def _fallback_digest(self, name: str, past: history.BundleHistory | None) -> str:
        before = past.previous if past is not None else None
        if before is None or not history.copy_folder(self._conf.data_dir, before.digest).is_dir():
            return ""
        return "" if before.digest in overrides.load_quarantined(self._store, name) else before.digest

    def _quarantine_reason(self, name: str, old: RolloutState | None) -> str:
        if old is None or old.phase != "active":
            return ""
        found = overrides.load_quarantined(self._store, name).get(old.desired.digest)
        return "" if found is None else found.reason


def _make_bundle_request(
    name: str, digest: str, desired: DesiredBundle, past: history.BundleHistory | None, *, may_fetch: bool
) -> BundleRequest:
    if digest == desired.digest:
        return BundleRequest(name, desired.bundle, desired.version, digest, desired if may_fetch else None)
    before = past.previous if past is not None else None
    return BundleRequest(name, before.name if before else "", before.version if before else "", digest)


def _describe_proof(proven: ProvenBundle) -> str:
    made = " and its golden vectors came out" if "golden.npz" in proven.bundle.files else ""
    return f"it was verified and run on this machine{made}"


def _is_deadline_passed(desired: DesiredBundle | None, now: ClockReading) -> bool | None:
    """Whether its deadline is over; None where nobody can tell what time it is."""
    if desired is None or desired.deadline is None:
        return False
    return None if now.quality == "unsynced" else now.wall_us >= clock.parse_rfc3339(desired.deadline)
