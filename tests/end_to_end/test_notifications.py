"""An alert's way from a device's message to a webhook and a mail, through broker and collector, with a dead target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from outstation.workbench.testing.patience import wait_until
from tests.integrations.notify.servers import HookServer, Mailbox, hook_server, mailbox

NOW = "2026-11-24T22:20:00.000000Z"
CHUNKS, CHUNK = 5, 400


@contextmanager
def collecting(folder: Path, notify: str) -> Iterator[tuple[LocalFleet, MessageSender, Link]]:
    """Run broker and collector with a `[notify]` section; yield a device's connection, too."""
    folder.mkdir(exist_ok=True)
    with LocalFleet(folder) as fleet:
        toml = fleet.home / "fleet.toml"
        toml.write_text(
            f"{toml.read_text(encoding='utf-8')}\n{notify}\n[quota]\nmessages_per_s = 100000\n", encoding="utf-8"
        )
        sender = MessageSender()
        store = fleet.open_store(write=True)
        store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
        store.close()
        fleet.broker.start()
        fleet.collector.start()
        wait_until("the collector runs", lambda: "collecting fleet" in fleet.collector.log.read_text(encoding="utf-8"))
        with Link(fleet.config.broker, sender.device) as link:
            yield fleet, sender, link


def time_of(link: Link, sent: SignedMessage, *arrived: Callable[[], bool]) -> list[float]:
    """Send a message; return the seconds until each condition held."""
    began, took = time.monotonic(), [0.0] * len(arrived)
    link.send(sent.to_outgoing())
    while not all(took):
        link.receive(0.005)
        for i, condition in enumerate(arrived):
            if not took[i] and condition():
                took[i] = time.monotonic() - began
        assert time.monotonic() - began < 60, took
    return took


def seconds_to_store(fleet: LocalFleet, sender: MessageSender, link: Link) -> float:
    """Send many results; return how long the collector took to store them."""
    [(before,)] = fleet.query("SELECT count(*) FROM messages")
    batch = [sender.results() for _ in range(CHUNKS * CHUNK)]
    began = time.monotonic()
    for n in range(CHUNKS):
        for item in batch[n * CHUNK : (n + 1) * CHUNK]:
            link.send(item.to_outgoing())
            link.receive(0.0)
        # The broker drops what is beyond its queue.
        while fleet.query("SELECT count(*) FROM messages")[0][0] < before + (n + 1) * CHUNK:
            link.receive(0.01)
            assert time.monotonic() - began < 60
    return time.monotonic() - began


def targets(hook: HookServer, box: Mailbox) -> str:
    return f"""
[notify.targets.hook]
kind = "webhook"
url = "{hook.url}"
[notify.targets.mail]
kind = "email"
host = "127.0.0.1"
port = {box.port}
security = "none"
from = "fleet@example.org"
to = ["eva@example.org"]
"""


def test_an_alert_reaches_webhook_and_mail_within_seconds(tmp_path: Path) -> None:
    with (
        hook_server() as hook,
        mailbox(tmp_path, security="none") as box,
        collecting(tmp_path / "fleet", targets(hook, box)) as (fleet, sender, link),
    ):
        stored = time_of(
            link,
            sender.alert(summary="ax: the sensor is unplugged."),
            lambda: fleet.query("SELECT count(*) FROM alerts") == [(1,)],
            lambda: bool(hook.posts),
            lambda: bool(box.mails),
        )
        print("seconds to database, webhook, mail:", [round(each, 2) for each in stored])
        assert max(stored) < 30
        assert box.mails[0]["Subject"] == "[warning] pi-07: ax: the sensor is unplugged."
        fleet.collector.kill()
        fleet.collector.start()
        time.sleep(5)
        # A mail that was sent but not marked when the collector was killed has the same Message-ID.
        assert len({mail["Message-ID"] for mail in box.mails}) == 1
        assert len({post.headers["idempotency-key"] for post in hook.posts}) == 1


def test_a_webhook_that_hangs_delays_no_ingest(tmp_path: Path) -> None:
    with hook_server() as hook, mailbox(tmp_path, security="none") as box:
        with collecting(tmp_path / "without", "") as without:
            usual = seconds_to_store(*without)
        hook.hang_s = 60.0
        with collecting(tmp_path / "with", targets(hook, box)) as (fleet, sender, link):
            time_of(link, sender.alert(), lambda: bool(hook.posts))
            hanging = seconds_to_store(fleet, sender, link)
    print(f"seconds for {CHUNKS * CHUNK} messages: {usual:.2f} without, {hanging:.2f} with a webhook that hangs")
    # A target that were asked in the collector's loop would take ten seconds a message.
    assert hanging < usual + 8
