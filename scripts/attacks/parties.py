"""Parties of the transcript: a fleet of two devices with real processes, and what each party holds.

`pi-08` runs the daemon. `pi-07` is hostile: it has its own valid certificate and signing key, and no daemon.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
from msgspec.structs import replace

from outstation.fleet import config as fleet_config
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import collectors, pki
from outstation.foundation import clock
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import keys, root_metadata, trust
from outstation.protocol.wire.keys import PublicKey, SigningKey
from outstation.workbench.testing.fleet import FLEET, LocalFleet
from outstation.workbench.testing.messages import MessageSender
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation
from scripts.kit.broker_client import publish_all

BASE = f"outstation/{FLEET}"
HOSTILE, HONEST = "pi-07", "pi-08"
# A burst of 400 messages, and 20 a second afterwards.
_QUOTA = "\n[quota]\nmessages_per_s = 20\nburst_s = 20\n"
_ROWS, _KEEP = 10**9, 'keep_readings = "1 h"'


class Parties:
    """The fleet's processes, and what each party knows. `auditor_root` is the auditor's only key material."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = LocalFleet(folder, tls=True)
        self.home = self.fleet.home
        config = self.home / fleet_config.FILE
        config.write_text(config.read_text(encoding="utf-8") + _QUOTA, encoding="utf-8")
        self.root_keys = folder / "root-keys"
        self.root_keys.mkdir()
        self._prepare_root()
        self.fleet.config = fleet_config.load(self.home)
        self.thief = self.fleet.add_device(HOSTILE)
        self.device = self.fleet.add_device(HONEST).add_replay_stream(_ROWS, 40, buffer=_KEEP).add_task("exercise")
        self.sender = MessageSender(HOSTILE, keys.load_private(self.thief.home / "device.key"))
        self.auditor_root = (self.thief.home / "root.json").read_bytes()
        self.head = folder / "pi-08.head.json"
        self.run("collector", "b")

    def __enter__(self) -> Parties:
        self.fleet.broker.start()
        self.fleet.collector.start()
        self.device.start_and_wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.__exit__()

    def _prepare_root(self) -> None:
        """Make the repository's root; its trust document lists the keys of operator and collector."""
        key = ("--root-keys", str(self.root_keys), "--roots", "1", "--threshold", "1")
        self.run("repository", "init", *key, "--url", str(self.home / "repository"))
        self.run(
            "keys", "add", "reporter", keys.create().public.text, "--sign-with", str(self.root_keys / "root-1.key")
        )

    def run(self, *words: str, check: bool = True) -> CompletedProcess[str]:
        """Run `outstation fleet …` in the operator's folder."""
        done = run_outstation("fleet", *words, *(() if "verify" in words else ("--dir", str(self.home))))
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def run_json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json", check=False).stdout)

    # What each party connects with.

    def as_device(self, home: Path) -> BrokerConfig:
        files = {"cert_file": str(home / "device.crt"), "tls_key_file": str(home / "device-tls.key")}
        return replace(self.fleet.config.broker, **files)

    def link_of_thief(self, **options: Any) -> Link:
        return Link(self.as_device(self.thief.home), HOSTILE, **options)

    def link_of_collector(self) -> Link:
        """Connect beside the running collector, as a second one."""
        identity = collectors.resolve_identity(self.fleet.config, "b")
        return Link(self.fleet.config.broker_for(identity), "collector-b")

    def link_of_operator(self, **options: Any) -> Link:
        return Link(self.fleet.config.broker_for(self.fleet.config.operator), "operator", **options)

    def with_certificate_for(self, name: str) -> BrokerConfig:
        """Return the settings of a client with a certificate that the operator issues in any name."""
        config = self.fleet.config
        assert config.ca is not None
        authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
        issued = authority.issue_client(name, FLEET)
        files = {"cert_file": self.folder / f"{name}.crt", "tls_key_file": self.folder / f"{name}-tls.key"}
        for path, data in zip(files.values(), (issued.certificate, issued.key), strict=True):
            path.write_bytes(data)
        return replace(config.broker, **{name: str(path) for name, path in files.items()})

    @property
    def operator_key(self) -> SigningKey:
        return keys.load_private(self.home / "operator.key")

    @property
    def collector_key(self) -> SigningKey:
        return keys.load_private(self.home / "collector.key")

    # What the collector stored.

    def count(self, device: str) -> int:
        return int(self.fleet.query("SELECT count(*) FROM messages WHERE device = ?", device)[0][0])

    def refusals(self, device: str) -> Counter[str]:
        with self.fleet.open_store() as store:
            return Counter({row["reason"]: row["count"] for row in store.refusals() if row["device"] == device})

    def await_refusal(self, device: str, messages: Sequence[OutgoingMessage], link: Link, n: int = 1) -> str:
        """Publish messages in a device's name, of which the collector must refuse `n`; return its reason."""
        before = self.refusals(device)
        publish_all(link, messages)
        wait_until(f"{n} refusals", lambda: (self.refusals(device) - before).total() >= n)
        return ", ".join(self.refusals(device) - before)

    def public_key(self, device: str) -> PublicKey:
        with self.fleet.open_store() as store:
            key = store.active_key(device)
        assert key is not None
        return key

    def open_alerts(self, device: str) -> dict[str, str]:
        """Return the severity of each open alert, by its subject."""
        with self.fleet.open_store() as store:
            return {str(row["subject"]): str(row["severity"]) for row in store.alerts(device)}

    # What the auditor does.

    def operator_key_of_root(self) -> PublicKey:
        """Return the operator's public key that the public root names."""
        document = trust.read_trust(root_metadata.parse(self.auditor_root))
        assert document is not None
        return next(entry.parse() for entry in document.keys if entry.role == trust.OPERATOR)

    def take_head(self) -> None:
        """Let `pi-08` sign where its log ends, once the collector has it; the auditor gets the file from the device."""
        done = run_outstation("head", "--json", "-c", str(self.device.config))
        self.head.write_text(done.stdout, encoding="utf-8")
        seq = json.loads(done.stdout)["head"]["seq"]
        wait_until(f"message {seq} of {HONEST}", lambda: self.count(HONEST) >= seq)

    def verify(self, folder: Path, *, with_head: bool) -> Any:
        """Verify an evidence folder with the key that the root names, and with the device's head or without."""
        head = ("--witness", str(self.head)) if with_head else ()
        return self.run_json("evidence", "verify", str(folder), "--operator", self.operator_key_of_root().text, *head)

    def read_readings(self) -> list[str]:
        """Return the readings behind one message of `pi-08`, which only the device discloses, with 8 digits or more.

        Fewer digits occur by chance among the numbers of an evidence folder.
        """
        sql = "SELECT payload FROM messages WHERE device = ? AND kind = 'results' ORDER BY seq DESC LIMIT 1"
        first, last = json.loads(self.fleet.query(sql, HONEST)[0][0])["rows"]
        done = run_outstation("disclose", "exercise", "--rows", f"{first}-{last}", "-c", str(self.device.config))
        assert done.returncode == 0, done.stderr
        values = [value for column in json.loads(done.stdout)["columns"] for value in column]
        texts = {text.lstrip("-") for value in values for text in (str(np.float32(value)), f"{value:.12f}"[:13])}
        return sorted(text for text in texts if len(text) >= len("0.12345678") and abs(float(text)) >= 0.1)

    # What the operator makes of the database.

    def read_log(self, device: str) -> list[IncomingMessage]:
        with self.fleet.open_store() as store:
            rows = list(store.evidence(device))
        return [IncomingMessage(topic, payload, (jws,), False, 1, 1) for _, _, _, _, topic, payload, jws, _ in rows]

    def forge_database(
        self, name: str, enrolled: Iterable[tuple[str, PublicKey]], messages: Sequence[IncomingMessage]
    ) -> Path:
        """Write a database of exactly these devices and messages; return the evidence folder made of it."""
        path = self.folder / f"{name}.db"
        with FleetStore(path) as store:
            now = clock.now_rfc3339()
            for device, key in enrolled:
                store.enrol(device, key, replace=False, now=now)
            collector = Collector(FLEET, self.fleet.config.broker, store, self.collector_key)
            arrivals, refusals = collector.verify(messages)
            assert not refusals, refusals[0].reason
            store.ingest(arrivals, [], now)
        return self.make_evidence(name, path)

    def make_evidence(self, name: str, database: Path | None = None) -> Path:
        out = self.folder / f"evidence-{name}"
        self.run("evidence", "--out", str(out), *(("--db", str(database)) if database else ()))
        return out


@contextlib.contextmanager
def meet(folder: Path) -> Iterator[Parties]:
    """Start the processes, and wait until the collector has results of `pi-08`."""
    with Parties(folder) as parties:
        wait_until("results", lambda: parties.fleet.last_result_row(HONEST) > 0)
        yield parties
