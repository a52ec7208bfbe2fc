"""MQTT subscription as a stream: messages on a broker of this site, acknowledged once their rows are committed.

The broker queues messages in a persistent session while this device is busy or away. If the connection breaks between
commit and acknowledgement, the repeated message is recognized and ignored; after a crash of the process it is stored
again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import msgspec

from outstation.device.config import StreamConfig
from outstation.device.config.sources import MqttSource
from outstation.device.intake.group_commit import CommitOutcome
from outstation.device.intake.source import SourceContext, SubmitRows
from outstation.device.intake.sources import jsonpath
from outstation.device.intake.sources.unconfirmed import UnconfirmedMessages
from outstation.device.store.rows import RawColumns
from outstation.device.store.store import Store
from outstation.foundation.backoff import Backoff
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import ConfigError, LinkDown
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage

log = logging.getLogger("outstation.mqtt")

_FULL_RETRY_S = 1.0
_RECONNECTION = Backoff(1.0, 60.0)
# Often enough for the broker's keep-alive.
_RECEIVE_TIMEOUT_S = 5.0
_SHUTDOWN_S = 2.0
# Messages that arrive within this time of the first one are submitted together, up to a count.
_GATHER_S, _MAX_GATHERED = 0.01, 1_000
# (packet identifier, topic, digest of the payload): all three are the same when a message is repeated.
_MessageKey = tuple[int, str, bytes]
# More than a broker has in flight, and fewer than it has packet identifiers.
_MAX_COMMITTED_KEYS = 10_000
# Submits messages; True: the broker sends no more before they are confirmed.
SubmitMessages = Callable[[list[IncomingMessage], bool], Future[CommitOutcome]]


def check(context: SourceContext, source: MqttSource) -> str:
    """Describe the source. Raises ConfigError for an unknown field, a malformed path or topic filter."""
    file, key = context.file, f"streams.{context.name}.source"
    fields = [field.name for field in context.stream.fields]
    for name in source.paths:
        if name not in fields:
            unknown = f"{name!r} is not a field of this stream{did_you_mean(name, fields)}"
            raise ConfigError(file, f"{key}.paths", unknown)
    try:
        _parse_paths(context.stream, source)
    except ValueError as problem:
        raise ConfigError(file, f"{key}.paths", str(problem)) from None
    levels = source.topic.split("/")
    wild = any(("#" in level or "+" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]
    if not source.topic or wild or "\0" in source.topic or source.topic.startswith("$share/"):
        no_filter = f"{source.topic!r} is no topic filter; + stands for one level, # for all that follow"
        raise ConfigError(file, f"{key}.topic", no_filter)
    return f"{source.topic} at {source.broker.shown_url}"


def build(context: SourceContext, source: MqttSource, store: Store) -> MqttSubscriber:
    check(context, source)
    client_id = f"{context.conf.device.id}-{context.name}"
    return MqttSubscriber(context.name, context.stream, source, client_id)


class MqttSubscriber:
    def __init__(self, name: str, stream: StreamConfig, source: MqttSource, client_id: str) -> None:
        self._name, self._stream, self._source, self._client_id = name, stream, source, client_id
        self._paths, self._time_path = _parse_paths(stream, source)
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._committed_keys: deque[_MessageKey] = deque(maxlen=_MAX_COMMITTED_KEYS)
        self._last_warning = ""

    async def run(self, submit_rows: SubmitRows) -> None:
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[None] = loop.create_future()

        def consume() -> None:
            try:
                self._consume(
                    lambda deliveries, is_stalled: asyncio.run_coroutine_threadsafe(
                        self._submit_messages(deliveries, submit_rows, is_stalled), loop
                    )
                )
            except CancelledError:
                log.info("%s: ended before the last messages were committed; the broker repeats them", self._name)
            except Exception as error:
                if not self._stopping.is_set():
                    loop.call_soon_threadsafe(broken.set_exception, error)

        thread = threading.Thread(target=consume, name=f"mqtt-{self._name}", daemon=True)
        thread.start()
        try:
            await broken
        finally:
            self._stopping.set()
            if self._link is not None:
                self._link.wake()
            # The last commit of the intake is acknowledged, too.
            await asyncio.to_thread(thread.join, _SHUTDOWN_S)

    def _consume(self, submit: SubmitMessages) -> None:
        """Receive messages until `run` ends, reconnecting as needed."""
        failures = 0
        while not self._stopping.is_set():
            try:
                link = Link(
                    self._source.broker,
                    self._client_id,
                    subscribe=[self._source.topic],
                    session_expiry_s=int(self._source.session_expiry),
                )
                self._link, failures = link, 0
                log.info("%s: subscribed to %s at %s", self._name, self._source.topic, self._source.broker.shown_url)
                try:
                    self._receive_messages(link, submit)
                finally:
                    self._link = None
                    link.close()
            except LinkDown as down:
                self._warn_once(f"{down}; trying again until it works")
                failures += 1
                self._stopping.wait(_RECONNECTION.wait_s(failures))

    def _receive_messages(self, link: Link, submit: SubmitMessages) -> None:
        waiting: deque[tuple[Future[CommitOutcome], list[IncomingMessage]]] = deque()
        unconfirmed = UnconfirmedMessages(link.capabilities.receive_maximum)
        try:
            while waiting or not self._stopping.is_set():
                if new := self._gather_messages(link, unconfirmed):
                    commit = submit(new, unconfirmed.is_at_limit)
                    commit.add_done_callback(lambda _: link.wake())
                    waiting.append((commit, new))
                confirmed: list[IncomingMessage] = []
                while waiting and waiting[0][0].done():
                    confirmed += self._record_committed(*waiting.popleft())
                for message in confirmed:
                    link.acknowledge(message)
                if limited := sum(message.qos > 0 for message in confirmed):
                    unconfirmed.confirm(limited, time.monotonic())
        except LinkDown:
            # They are repeated on the next connection: by then they must be recorded as committed.
            for commit, new in waiting:
                self._record_committed(commit, new)
            raise

    def _gather_messages(self, link: Link, unconfirmed: UnconfirmedMessages) -> list[IncomingMessage]:
        """Return the messages that arrive together, none if `link` was woken; confirm those committed before.

        A submission of its own would cost a message five times the CPU time.
        """
        gathered: list[IncomingMessage] = []
        wait_s, end_s = _RECEIVE_TIMEOUT_S, math.inf
        while wait_s > 0:
            try:
                events = link.receive(wait_s)
            except LinkDown:
                if not gathered:
                    raise
                # The next call raises it again.
                break
            if self._stopping.is_set():
                break
            for message in events:
                if not isinstance(message, IncomingMessage):
                    continue
                if message.duplicate and _message_key(message) in self._committed_keys:
                    link.acknowledge(message)
                    continue
                gathered.append(message)
                if message.qos:
                    unconfirmed.add(time.monotonic())
            if not gathered or len(gathered) >= _MAX_GATHERED or unconfirmed.is_at_limit:
                break
            end_s = min(end_s, time.monotonic() + _GATHER_S)
            wait_s = end_s - time.monotonic()
        return gathered

    def _record_committed(
        self, future: Future[CommitOutcome], deliveries: Sequence[IncomingMessage]
    ) -> Sequence[IncomingMessage]:
        future.result()
        self._committed_keys.extend(map(_message_key, deliveries))
        return deliveries

    async def _submit_messages(
        self, deliveries: Sequence[IncomingMessage], submit_rows: SubmitRows, is_stalled: bool
    ) -> CommitOutcome:
        """Submit all rows of these messages, and the messages without valid rows with a reason."""
        rows: list[Mapping[str, Any]] = []
        numbers: list[int] = []
        refused: dict[int, str] = {}
        for number, delivery in enumerate(deliveries, 1):
            try:
                parsed = self._parse_message(delivery)
            except ValueError as problem:
                refused[number] = str(problem)
            else:
                rows += parsed
                numbers += [number] * len(parsed)
        columns = {field.name: [row[field.name] for row in rows] for field in self._stream.fields}
        t = None if self._time_path is None else [row["t"] for row in rows]
        raw = RawColumns(len(rows), t, columns)
        submit = partial(submit_rows, self._name, raw, None, numbers, refused, is_stalled=is_stalled)
        while (outcome := await submit()).is_store_full:
            await asyncio.sleep(_FULL_RETRY_S)
        if outcome.rejected:
            number, reason = outcome.rejected[0]
            # Levels of a topic may be values of fields.
            topic = deliveries[number - 1].topic if self._stream.privacy.file_names else "a message"
            self._warn_once(f"{topic}: not stored: {reason}")
        else:
            self._last_warning = ""
        return outcome

    def _parse_message(self, delivery: IncomingMessage) -> list[dict[str, Any]]:
        """Parse a message to one row, or an array of objects to one row each. Raises ValueError."""
        try:
            payload = msgspec.json.decode(delivery.payload)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ValueError(f"no JSON: {str(error)[:120]}") from None
        is_array = isinstance(payload, list) and payload and all(isinstance(item, dict) for item in payload)
        levels = delivery.topic.split("/")
        return [self._parse_row(item, levels) for item in (payload if is_array else [payload])]

    def _parse_row(self, payload: Any, levels: list[str]) -> dict[str, Any]:
        document = {"$": payload, "topic": levels}
        values = {name: jsonpath.find(document, path) for name, path in self._paths.items()}
        row = {name: None if value is jsonpath.MISSING else value for name, value in values.items()}
        if self._time_path is not None:
            row["t"] = jsonpath.find(document, self._time_path)
            if row["t"] is jsonpath.MISSING:
                raise ValueError(f"no time at {self._source.t!r}")
        return row

    def _warn_once(self, warning: str) -> None:
        """Log a warning unless it is the same as the last one."""
        if warning != self._last_warning:
            log.warning("%s: %s", self._name, warning)
        self._last_warning = warning


def _parse_paths(
    stream: StreamConfig, source: MqttSource
) -> tuple[dict[str, jsonpath.JsonPath], jsonpath.JsonPath | None]:
    """Parse the paths of the fields and of the time within {"$": payload, "topic": levels}. Raises ValueError."""
    fields = {field.name: _parse_path(source.paths.get(field.name, f"$[{field.name!r}]")) for field in stream.fields}
    return fields, None if source.t is None else _parse_path(source.t)


def _parse_path(text: str) -> jsonpath.JsonPath:
    if text.startswith("topic["):
        return jsonpath.parse(f"$.{text}")
    return ("$", *jsonpath.parse(text))


def _message_key(delivery: IncomingMessage) -> _MessageKey:
    return delivery.mid, delivery.topic, hashlib.blake2b(delivery.payload, digest_size=16).digest()
