"""Feedback loops in a config: a stream that reads the answers of a model, so that predictions become inputs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from outstation.device.config import Config
from outstation.device.config.sources import MqttSource
from outstation.integrations.homeassistant.config import DEFAULT_PREFIX
from outstation.integrations.homeassistant.discovery import Place
from outstation.protocol.wire.topics import Topic, topic_matches


class FeedbackLoop(msgspec.Struct, frozen=True):
    """A stream with a source that reads answers of `task`, and the tasks that read the stream."""

    stream: str
    topic: str
    task: str
    readers: tuple[str, ...]

    @property
    def summary(self) -> str:
        closed = self.task in self.readers
        effect = (
            "its answers become its own input, so that mistakes feed themselves"
            if closed
            else f"they become the input of {', '.join(self.readers) or 'no task yet'}, which cannot see its mistakes"
        )
        return (
            f"[streams.{self.stream}.source] topic {self.topic!r} also reads the results of task {self.task}: "
            f"{effect}. Drift and labels of these rows prove nothing; read a topic of sensors only"
        )


def find(conf: Config) -> Iterator[FeedbackLoop]:
    """Yield the streams whose MQTT topic covers results that this device publishes."""
    for name, stream in conf.streams.items():
        if not isinstance(stream.source, MqttSource):
            continue
        readers = tuple(task for task, settings in conf.tasks.items() if settings.stream == name)
        for task in conf.tasks:
            if any(topic_matches(stream.source.topic, topic) for topic in _result_topics(conf, task)):
                yield FeedbackLoop(name, stream.source.topic, task, readers)


def _result_topics(conf: Config, task: str) -> list[str]:
    device, fleet = conf.device.id, conf.device.fleet
    documents = Place(fleet, device, DEFAULT_PREFIX)
    return [str(Topic(fleet, device, "results", task)), documents.latest_topic(device, task)]
