"""Attack: a device with a valid key sends texts with markup, terminal escapes, formulas and reordering characters.

One table of outlets: whatever shows a device's texts shows them on a line, short, and as nothing but text. Mail,
webhook and chat are in tests/integrations/notify/test_targets.py.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from outstation.fleet.bridge.stored_devices import StoredDevices
from outstation.fleet.collector.quota import Quota
from outstation.fleet.collector.statistics import CollectorStatistics
from outstation.fleet.enrolment import enrol
from outstation.fleet.metrics.collector_families import build_families
from outstation.fleet.metrics.exporter import DatabaseExporter
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.integrations.homeassistant.device_state import DeviceState
from outstation.integrations.homeassistant.discovery import (
    RAISED,
    Place,
    discovery_document,
    event_document,
    latest_documents,
)
from outstation.integrations.sparkplug.sparkplug import list_history, list_metrics
from outstation.protocol.wire.messages import ResultsPayload
from outstation.protocol.wire.verification import decode
from outstation.workbench.testing.messages import FLEET, MODEL, MessageSender
from scripts.grafana_dashboards import build
from tests.kit.commands import call_outstation
from tests.kit.dashboards import ServedDashboard, enrolled, health, served, wait_until_shown

pytestmark = pytest.mark.attack("texts")

TEXTS = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>",
    "'\"><svg/onload=alert(3)>&lt;b&gt;{{ 7*7 }}{% raw %}${x}",
    "\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f",
    "line\r\nX-Injected: 1\r\n\r\nbody\u2028next\u2029\x0b\x0c\x85",
    "\u202egnp.exe\u2066\u2067\u2068\u200f\u061c\u200b\ufeff\U000e0041",
    '=HYPERLINK("http://x","y")',
    "'; DROP TABLE alerts; --",
    "\x00nul\ud7ff",
    "w" * 250,
    "<blink>" * 30,
)
LONG = ("x" * 10_000, "\x1b[31m" * 2000, "\u202e" * 10_000)
# Everything that steers a terminal, ends a line or reorders it.
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\U000e0041]"
)
PLACE = Place(FLEET, "collector", "homeassistant")


class Site(msgspec.Struct):
    dashboard: ServedDashboard
    senders: list[MessageSender]

    @property
    def folder(self) -> Path:
        return self.dashboard.folder

    def run(self, *arguments: str) -> str:
        done = call_outstation("fleet", *arguments, "--dir", str(self.folder))
        assert "Traceback" not in done.stderr
        assert not STEERING.search(done.stderr)
        return done.stdout

    def states(self) -> Iterator[tuple[DeviceState, list[bytes]]]:
        with closing(StoredDevices(self.dashboard.store.location)) as source:
            for report in source.poll():
                state = DeviceState(report.device)
                state.update(report)
                yield state, [*report.payloads]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Yield a fleet with one device for each text, which sends it wherever a device writes freely."""
    with served(tmp_path_factory.mktemp("texts") / FLEET) as dashboard:
        senders = []
        for number, text in enumerate(TEXTS):
            sender = enrolled(dashboard.store, f"evil-{number}", 50 + number)
            model = {**MODEL, "name": text[:200], "version": text[:60]}
            columns = {"row": [100, 200], "t": [1_764_022_680_000_000, 1_764_022_681_000_000], "label": [text, text]}
            units, task = {sender.task: [text]}, {"stream": text, "row": 200, "windows": 2, "model": model}
            dashboard.add(
                sender,
                sender.results(2, columns=columns | {f"value_{text}": [1.0, 2.0]}, model=model, faults=[text]),
                sender.drift("drift", model=model),
                health(sender, agent=text, groups=[text], tasks={sender.task: task}, units=units),
                sender.alert(f"exercise/{text[:200]}/1", summary=text, subject=text[:200], severity="critical"),
                sender.append("audit", event=text, summary=text, evidence={text: text}),
            )
            senders.append(sender)
        wait_until_shown(dashboard, "/fleet", f"evil-{len(TEXTS) - 1}")
        yield Site(dashboard, senders)


class Page(HTMLParser):
    """Elements and attributes that a browser would run."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        is_ours = tag in ("script", "img") and str(named.get("src", "")).startswith("/")
        if tag in ("img", "blink", "iframe", "object") and not is_ours:
            self.active.append(f"<{tag} {named}>")
        if tag == "script" and not is_ours and named.get("type") != "application/json":
            self.active.append(f"<script {named}>")
        for name, value in named.items():
            if name.startswith("on") or (name in ("href", "src") and str(value).lower().startswith("javascript:")):
                self.active.append(f"{name}={value}")


def pages(site: Site) -> Iterator[str]:
    paths = ["/fleet", "/incidents", "/tasks", "/models", "/audit", "/rollouts"]
    for sender in site.senders:
        paths += [f"/devices/{sender.device}", *(f"/messages/{sender.device}/{sender.log}/{seq}" for seq in (1, 4, 5))]
    incidents = site.dashboard.get("/incidents").text
    paths += sorted(set(re.findall(r'href="(/incidents/[0-9a-f]{12})', incidents)))
    assert len(paths) > 50
    for path in paths:
        answer = site.dashboard.get(path)
        assert answer.status == 200, path
        page = Page()
        page.feed(answer.text)
        assert page.active == [], path
        assert "X-Injected" not in answer.headers
        yield answer.text


def terminal(site: Site) -> Iterator[str]:
    for arguments in (["devices"], ["alerts", "--all"], ["gaps"], ["drift"], ["notify", "queue"]):
        yield site.run(*arguments)
        document = site.run(*arguments, "--json")
        if document:
            json.loads(document)
        yield document


def csv_rows(site: Site) -> Iterator[str]:
    out = site.folder / "export"
    site.run("export", "--out", str(out))
    for kind in ("results", "alerts"):
        text = site.run("sql", "--export", str(out), "--csv", f"SELECT * FROM {kind}")
        rows = [*csv.reader(io.StringIO(text))]
        assert len({len(row) for row in rows}) == 1
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "@", "\t", "\r"))]
        yield text
        yield site.run("sql", "--export", str(out), f"SELECT * FROM {kind}")


def strings(value: object) -> Iterator[str]:
    """Yield the texts of a JSON document, names of members included."""
    if isinstance(value, dict):
        for name, member in value.items():
            yield str(name)
            yield from strings(member)
    elif isinstance(value, list):
        for member in value:
            yield from strings(member)
    elif isinstance(value, str):
        yield value


def home_assistant(site: Site) -> Iterator[str]:
    for state, _ in site.states():
        discovery = json.loads(discovery_document(PLACE, state, {}))
        for component in discovery["cmps"].values():
            for name in ("val_tpl", "stat_t", "json_attr_t", "json_attr_tpl", "unique_id"):
                assert not any(word in component.get(name, "") for word in ("alert(", "7*7", "HYPERLINK", "DROP"))
        documents = [json.loads(each.payload) for each in latest_documents(PLACE, state)]
        documents += [json.loads(event_document(RAISED, alert)) for alert in state.alerts.values()]
        for document in (discovery, *documents):
            yield from strings(document)


def sparkplug(site: Site) -> Iterator[str]:
    for state, payloads in site.states():
        metrics = list_metrics(state)
        for payload in payloads:
            if isinstance(body := decode(payload), ResultsPayload):
                metrics += list_history(body, state.tasks[body.task], None)
        for metric in metrics:
            yield from (metric.name, metric.unit, str(metric.value))


def prometheus(site: Site) -> Iterator[str]:
    statistics = CollectorStatistics()
    location = str(site.dashboard.store.location)
    exporter = DatabaseExporter(FLEET, location, lambda: build_families(FLEET, "", statistics, Quota()))
    with closing(exporter):
        text = exporter.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield from sample.labels.values()


def grafana(site: Site) -> Iterator[str]:
    """Run the queries of the dashboard with hostile names of devices; Grafana itself escapes cells."""
    quoted = ", ".join("'{}'".format(text.replace("'", "''").replace("\x00", "")) for text in TEXTS)
    with closing(sqlite3.connect(f"file:{site.dashboard.store.location}?mode=ro", uri=True)) as connection:
        for panel in build("sqlite")["panels"]:
            query = panel["targets"][0]["rawQueryText"].replace("${device:sqlstring}", quoted)
            rows = connection.execute(query.replace("$__from", "0").replace("$__to", "4000000000000")).fetchall()
            assert rows == [] or "device IN" not in query
        [(count,)] = connection.execute("SELECT count(*) FROM alerts").fetchall()
        assert count > len(TEXTS)
    yield ""


OUTLETS: dict[str, tuple[Callable[[Site], Iterator[str]], int]] = {
    # Outlet → what it shows, and the longest text or page.
    "page": (pages, 400_000),
    "terminal": (terminal, 200_000),
    "csv": (csv_rows, 200_000),
    "homeassistant": (home_assistant, 600),
    "sparkplug": (sparkplug, 600),
    "prometheus": (prometheus, 300),
    "grafana": (grafana, 0),
}


@pytest.mark.parametrize("outlet", OUTLETS)
def test_hostile_texts_are_harmless_at(site: Site, outlet: str) -> None:
    show, longest = OUTLETS[outlet]
    count = 0
    for text in show(site):
        count += 1
        steering = STEERING.search(text)
        assert steering is None, ascii(text[max(0, steering.start() - 60) : steering.end() + 20])
        assert len(text) <= longest
    assert count


@pytest.mark.parametrize("text", LONG, ids=lambda text: f"{text[0]!a}")
def test_texts_of_ten_kilobytes_are_refused_before_they_reach_an_outlet(site: Site, text: str) -> None:
    sender = site.senders[0]
    columns = {"row": [1], "t": [1_764_022_680_000_000], "label": [text]}
    seq, prev = sender.seq, sender.prev
    for message in (
        sender.alert(summary=text),
        sender.alert(subject=text),
        sender.results(1, columns=columns),
        sender.append("audit", event=text, summary=text),
        sender.results(1, model={**MODEL, "name": text}),
    ):
        with pytest.raises(MessageRefused):
            sender.verify(message)
    sender.seq, sender.prev = seq, prev


@pytest.mark.parametrize("name", [*TEXTS, *LONG, "../x", "a/b", "#", "+", "A"], ids=lambda name: ascii(name[:12]))
def test_no_device_has_such_a_name(site: Site, name: str) -> None:
    with pytest.raises(UsageError) as refused:
        enrol.device_folder(site.folder, name)
    assert not STEERING.search(str(refused.value))
    assert len(str(refused.value)) < 1000
