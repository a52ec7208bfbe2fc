"""Privacy of a stream, set by the device's owner: which fields leave the device, and how finely."""

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

import msgspec

from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError

# Kinds of messages about a task that the owner may keep on the device.
OptionalKind = Literal["results", "drift", "quality", "shadow", "alerts", "samples"]
_MIN_PERIOD_S = 3600.0


class StreamPrivacy(Section, frozen=True):
    """Rules for the stream's fields; without one they leave as they are.

    ```toml
    [streams.watch.privacy]
    private = ["wx", "wy", "wz"]
    round = { ax = 0.1 }
    messages = ["alerts", "drift"]
    ```

    [privacy.md](../concepts/privacy.md#fields) explains the rules; `outstation privacy` prints what leaves, with
    examples.
    """

    allow: list[str] | None = None
    """If given, fields that it does not name are private."""
    private: list[str] = msgspec.field(default_factory=list)
    """Fields of which nothing leaves."""
    round: dict[str, float] = msgspec.field(default_factory=dict)
    """Field → step: its numbers leave as multiples of the step."""
    hash: list[str] = msgspec.field(default_factory=list)
    """Category fields whose texts leave as keyed hashes."""
    hash_period: Duration = Duration(30 * 86_400.0)
    """Time of use of a key of the hashes."""
    messages: list[OptionalKind] | None = None
    """If given, the kinds about the stream's tasks that leave."""
    min_count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    """Least readings behind a number; the larger one of this and `[privacy] min_count` holds."""
    min_results: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    """Least results of a class in a message that lists them."""
    file_names: bool = True
    """The journal names files of a watched folder, and topics of messages."""

    def private_fields(self, fields: Collection[str]) -> frozenset[str]:
        """Return the fields that never leave."""
        left_out = () if self.allow is None else set(fields) - {*self.allow, *self.round, *self.hash}
        return frozenset({*self.private, *left_out})

    def protected_fields(self, fields: Collection[str]) -> frozenset[str]:
        """Return the fields that do not leave as they are."""
        return self.private_fields(fields) | {*self.round, *self.hash}

    def check(self, file: str, key: str, types: Mapping[str, str]) -> None:
        """Raise ConfigError if a value is wrong; `types`: field → type."""
        named: dict[str, str] = {}
        for rule, names in (("private", self.private), ("round", self.round), ("hash", self.hash)):
            for name in names:
                _check_field(file, f"{key}.{rule}", name, types)
                if name in named:
                    raise ConfigError(file, f"{key}.{rule}", f"{name!r} is in {named[name]}, too; remove one")
                named[name] = rule
        for name in self.allow or ():
            _check_field(file, f"{key}.allow", name, types)
            if name in self.private:
                raise ConfigError(file, f"{key}.allow", f"{name!r} is in private, too; remove one")
        for name, step in self.round.items():
            if types[name] == "category":
                raise ConfigError(file, f"{key}.round", f"{name!r} is a category; put it into hash or private")
            if not 0 < step < math.inf:
                raise ConfigError(file, f"{key}.round", f"the step of {name!r} must be above 0")
        for name in self.hash:
            if types[name] != "category":
                raise ConfigError(file, f"{key}.hash", f"{name!r} is a number; put it into round or private")
        if self.hash_period < _MIN_PERIOD_S:
            raise ConfigError(file, f"{key}.hash_period", "must be at least 1 h")


def _check_field(file: str, key: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ConfigError(file, key, f"the stream has no field {name!r}{did_you_mean(name, known)}")
