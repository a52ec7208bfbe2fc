"""Device whose owner consents to send readings, see `outstation.device.samples`."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.config.samples import SamplesConfig
from outstation.device.samples import budget
from outstation.device.samples.sampler import Sampler
from outstation.device.samples.selection import SampledTask
from outstation.foundation.clock import ClockReading
from outstation.protocol.wire.keys import EncryptionKey, encryption_key_of
from outstation.protocol.wire.messages import SamplesPayload
from scripts.kit.bundles import CENTRES
from tests.kit.devices import NOW, Device

KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = encryption_key_of(KEY)
CONSENT = SamplesConfig(consent="Mira Lang, 2026-11-28: readings for retraining")
FALL = AlertRuleConfig(name="fall", label="left", for_="1 of 1")
LATER = replace(NOW, boot_s=NOW.boot_s + 601)


class SampledDevice(Device):
    """Device whose owner consents."""

    def consent(self, config: SamplesConfig, key: EncryptionKey = PUBLIC) -> None:
        self.config = config
        bundle = self.active.bundle
        joined = {name: (each.name, each.config.fields) for name, each in self.joined_streams.items()}
        fields = self.stream.fields
        self.assemble_samples(SampledTask.from_bundle(config, ("tiny", "watch"), fields, bundle, joined))
        self.sampler = Sampler(self.store, self.author, lambda: key)

    def assemble_samples(self, samples: SampledTask | None) -> None:
        """Assemble the task again, so that these of its readings may be sent."""
        self.assemble(None if self.task.drift is None else self.task.drift.to_restored(), samples=samples)

    def feed_text(self, text: str) -> None:
        self.feed(CENTRES[["lr-".index(letter) for letter in text]])
        self.run_all()

    def send(self, now: ClockReading = NOW) -> list[SamplesPayload]:
        assert self.task.samples is not None
        self.sampler.tick([self.task.samples], now)
        return self.samples()

    def samples(self) -> list[SamplesPayload]:
        return [message.body for message in self.messages() if isinstance(message.body, SamplesPayload)]

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = budget.to_status(self.store, self.config, NOW)["samples"]
        return document
