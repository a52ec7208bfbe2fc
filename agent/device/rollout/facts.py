"""What there is for a task's next step: what is desired, what runs, and whether the bundle in question is here."""

from __future__ import annotations

from msgspec.structs import replace

from agent import clock
from agent.clock import Now
from agent.config import Config
from agent.device.bundles import history, overrides
from agent.device.bundles.rollout_state import Standing
from agent.device.rollout.desired_state import Desires
from agent.device.rollout.serving import Live, Serving
from agent.device.rollout.state_machine import Facts, Finding, aim
from agent.device.rollout.supply import Sought
from agent.device.store import retention
from agent.device.store.store import Store
from agent.model.activation import Proved
from agent.wire.desired_state import Wanted


class Outlook:
    """Of one device."""

    def __init__(self, conf: Config, store: Store, device: str, desires: Desires, serving: Serving) -> None:
        self._conf, self._store, self._device, self._desires, self._serving = conf, store, device, desires, serving

    def facts(self, live: Live, now: Now) -> Facts:
        """All there is, and goes on with seeking the bundle that the next step needs."""
        name, old, at_s = live.name, live.standing, self.uptime_s(now)
        wanted = self._desires.wanted(name)
        about = wanted if wanted is not None or old is None else old.wanted
        held = live.held.get(about.digest) if about else None
        past = history.history(self._store, name)
        facts = Facts(
            device=self._device,
            wanted=wanted,
            runs=self._serving.runs(live),
            configured=live.configured,
            now=clock.rfc3339(now.wall_us),
            now_s=at_s,
            held=held if held is not None and held.until_s > at_s else None,
            before=self._before(name, past),
            aside=self._aside(name, old),
            over=_is_over(about, now),
        )
        if live.trial is not None and old is not None:
            hours = (at_s - old.since_s) / 3600
            facts = replace(facts, against=live.trial.against(), enough=live.trial.enough(hours))
        return replace(facts, proof=self._proof(live, facts, past, now))

    def _proof(self, live: Live, facts: Facts, past: history.History | None, now: Now) -> Finding | None:
        """Whether the bundle that the next step needs is here and proved; goes on with that."""
        digest, old = aim(live.standing, facts), live.standing
        if not digest or old is None:
            live.supply.drop()
            live.proof = live.unfit = None
            return None
        if live.unfit is not None:
            return live.unfit
        if live.trial is not None and live.trial.candidate.bundle.digest == digest:
            return None
        # What answers already is not waited for from afar.
        fetched = old.phase != "probation"
        found = live.supply.seek(_sought(live.name, digest, old.wanted, past, fetched=fetched), now)
        live.proof = found if isinstance(found, Proved) else None
        if isinstance(found, Proved):
            return Finding("", _proved_by(found))
        return found

    def uptime_s(self, now: Now) -> float:
        """Seconds that the device was on."""
        return retention.uptime_s(self._store.meta(retention.UPTIME, ""), self._store.boot, now)

    def _before(self, name: str, past: history.History | None) -> str:
        before = past.before if past is not None else None
        if before is None or not history.folder(self._conf.data_dir, before.digest).is_dir():
            return ""
        return "" if before.digest in overrides.set_aside(self._store, name) else before.digest

    def _aside(self, name: str, old: Standing | None) -> str:
        if old is None or old.phase != "settled":
            return ""
        found = overrides.set_aside(self._store, name).get(old.wanted.digest)
        return "" if found is None else found.why


def _sought(name: str, digest: str, wanted: Wanted, past: history.History | None, *, fetched: bool) -> Sought:
    if digest == wanted.digest:
        return Sought(name, wanted.bundle, wanted.version, digest, wanted if fetched else None)
    before = past.before if past is not None else None
    return Sought(name, before.name if before else "", before.version if before else "", digest)


def _proved_by(found: Proved) -> str:
    made = " and its golden vectors came out" if "golden.npz" in found.bundle.files else ""
    return f"it was verified and run on this machine{made}"


def _is_over(wanted: Wanted | None, now: Now) -> bool | None:
    """Whether its deadline is over; None where nobody can tell what time it is."""
    if wanted is None or wanted.deadline is None:
        return False
    return None if now.quality == "unsynced" else now.wall_us >= clock.epoch_us(wanted.deadline)
