"""What others publish on a broker of this site as a stream: a message is confirmed once its rows are committed.

The broker keeps what comes meanwhile, and all while this device is away, in a session of its own. A message that was
committed but whose confirmation was lost with the connection is known again and not taken twice; after the death of
the process it is taken again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import msgspec

from agent import jsonpath
from agent.config import MqttSource, Stream
from agent.device.intake.group_commit import Outcome
from agent.device.intake.server import Offer
from agent.device.store.rows import Raw
from agent.errors import ConfigError, LinkDown
from agent.toml_files import suggestion
from agent.transport.mqtt import Link
from agent.transport.packets import Delivery

log = logging.getLogger("outstation.mqtt")

_FULL_S = 1.0
_RETRY_S = (1.0, 60.0)
# Often enough for the broker's keep-alive.
_TURN_S = 5.0
_END_S = 2.0
# (packet identifier, topic, digest of the payload): of a message that comes again all three are the same.
_Known = tuple[int, str, bytes]
# More than a broker has under way at once, and fewer than it has packet identifiers.
_MOST_KNOWN = 10_000


def require(file: str, name: str, stream: Stream, source: MqttSource) -> None:
    """Raises ConfigError where `source` names what is not there, or nothing that can be subscribed to."""
    key = f"streams.{name}.source"
    fields = [field.name for field in stream.fields]
    for given in source.paths:
        if given not in fields:
            unknown = f"{given!r} is not a field of this stream{suggestion(given, fields)}"
            raise ConfigError(file, f"{key}.paths", unknown)
    try:
        _paths(stream, source)
    except ValueError as problem:
        raise ConfigError(file, f"{key}.paths", str(problem)) from None
    levels = source.topic.split("/")
    wild = any(("#" in level or "+" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]
    if not source.topic or wild or "\0" in source.topic or source.topic.startswith("$share/"):
        no_filter = f"{source.topic!r} is no topic filter; + stands for one level, # for all that follow"
        raise ConfigError(file, f"{key}.topic", no_filter)


class Mqtt:
    """Subscribed as `client_id`, on a thread of its own."""

    def __init__(self, file: str, name: str, stream: Stream, source: MqttSource, client_id: str) -> None:
        """Raises ConfigError."""
        require(file, name, stream, source)
        self._name, self._stream, self._source, self._client_id = name, stream, source, client_id
        self._paths, self._t = _paths(stream, source)
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._committed: deque[_Known] = deque(maxlen=_MOST_KNOWN)
        self._complaint = ""

    async def run(self, offer: Offer) -> None:
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[None] = loop.create_future()

        def follow() -> None:
            try:
                self._follow(lambda deliveries: asyncio.run_coroutine_threadsafe(self._take(deliveries, offer), loop))
            except CancelledError:
                log.info("%s: ended before the last messages were committed; they come again", self._name)
            except Exception as error:
                if not self._stopping.is_set():
                    loop.call_soon_threadsafe(broken.set_exception, error)

        thread = threading.Thread(target=follow, name=f"mqtt-{self._name}", daemon=True)
        thread.start()
        try:
            await broken
        finally:
            self._stopping.set()
            if self._link is not None:
                self._link.wake()
            # What the intake commits at its end is confirmed, too.
            await asyncio.to_thread(thread.join, _END_S)

    def _follow(self, take: Callable[[list[Delivery]], Future[Outcome]]) -> None:
        """Until `run` ends; one connection after another."""
        delay = _RETRY_S[0]
        while not self._stopping.is_set():
            try:
                link = Link(
                    self._source.broker,
                    self._client_id,
                    subscribe=[self._source.topic],
                    session_expiry_s=int(self._source.keep),
                )
                self._link, delay = link, _RETRY_S[0]
                log.info("%s: subscribed to %s at %s", self._name, self._source.topic, self._source.broker.url)
                try:
                    self._collect(link, take)
                finally:
                    self._link = None
                    link.close()
            except LinkDown as down:
                self._complain(f"{down}; trying again for as long as it takes")
                self._stopping.wait(delay)
                delay = min(2 * delay, _RETRY_S[1])

    def _collect(self, link: Link, take: Callable[[list[Delivery]], Future[Outcome]]) -> None:
        waiting: deque[tuple[Future[Outcome], list[Delivery]]] = deque()
        try:
            while waiting or not self._stopping.is_set():
                came = [event for event in link.receive(_TURN_S) if isinstance(event, Delivery)]
                if self._stopping.is_set():
                    came = []
                again = [one for one in came if one.again and _known(one) in self._committed]
                for one in again:
                    link.acknowledge(one)
                if fresh := [one for one in came if one not in again]:
                    taken = take(fresh)
                    taken.add_done_callback(lambda _: link.wake())
                    waiting.append((taken, fresh))
                while waiting and waiting[0][0].done():
                    for one in self._settled(*waiting.popleft()):
                        link.acknowledge(one)
        except LinkDown:
            # They come again on the next connection: by then it must be known that they are committed.
            for taken, fresh in waiting:
                self._settled(taken, fresh)
            raise

    def _settled(self, taken: Future[Outcome], deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        taken.result()
        self._committed.extend(map(_known, deliveries))
        return deliveries

    async def _take(self, deliveries: Sequence[Delivery], offer: Offer) -> Outcome:
        """All rows of these messages, committed, or refused with a reason."""
        rows: list[Mapping[str, Any]] = []
        numbers: list[int] = []
        refused: dict[int, str] = {}
        for number, delivery in enumerate(deliveries, 1):
            try:
                found = self._rows(delivery)
            except ValueError as problem:
                refused[number] = str(problem)
            else:
                rows += found
                numbers += [number] * len(found)
        columns = {field.name: [row[field.name] for row in rows] for field in self._stream.fields}
        t = None if self._t is None else [row["t"] for row in rows]
        raw = Raw(len(rows), t, columns)
        while (outcome := await offer(self._name, raw, None, numbers, refused)).full:
            await asyncio.sleep(_FULL_S)
        if outcome.rejected:
            number, reason = outcome.rejected[0]
            self._complain(f"{deliveries[number - 1].topic}: not stored: {reason}")
        else:
            self._complaint = ""
        return outcome

    def _rows(self, delivery: Delivery) -> list[dict[str, Any]]:
        """The rows of a message: one, or of an array of objects one of each. Raises ValueError."""
        try:
            said = msgspec.json.decode(delivery.payload)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ValueError(f"no JSON: {str(error)[:120]}") from None
        several = isinstance(said, list) and said and all(isinstance(one, dict) for one in said)
        levels = delivery.topic.split("/")
        return [self._row(one, levels) for one in (said if several else [said])]

    def _row(self, said: Any, levels: list[str]) -> dict[str, Any]:
        document = {"$": said, "topic": levels}
        found = {name: jsonpath.find(document, path) for name, path in self._paths.items()}
        row = {name: None if value is jsonpath.MISSING else value for name, value in found.items()}
        if self._t is not None:
            row["t"] = jsonpath.find(document, self._t)
            if row["t"] is jsonpath.MISSING:
                raise ValueError(f"no time at {self._source.t!r}")
        return row

    def _complain(self, complaint: str) -> None:
        """Once, until it is another one."""
        if complaint != self._complaint:
            log.warning("%s: %s", self._name, complaint)
        self._complaint = complaint


def _paths(stream: Stream, source: MqttSource) -> tuple[dict[str, jsonpath.Path], jsonpath.Path | None]:
    """Of each field, and of the time, within {"$": payload, "topic": levels}. Raises ValueError."""
    fields = {field.name: _path(source.paths.get(field.name, f"$[{field.name!r}]")) for field in stream.fields}
    return fields, None if source.t is None else _path(source.t)


def _path(text: str) -> jsonpath.Path:
    if text.startswith("topic["):
        return jsonpath.parse(f"$.{text}")
    return ("$", *jsonpath.parse(text))


def _known(delivery: Delivery) -> _Known:
    return delivery.mid, delivery.topic, hashlib.blake2b(delivery.payload, digest_size=16).digest()
