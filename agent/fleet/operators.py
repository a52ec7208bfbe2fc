"""Whose decisions count: the operator's public keys, from the fleet's folder and not from its database."""

from __future__ import annotations

from pathlib import Path

from agent.errors import ConfigError
from agent.fleet.config import FILE, FleetConfig
from agent.wire import keys
from agent.wire.keys import PublicKey


def load_trusted_keys(config: FleetConfig) -> list[PublicKey]:
    """The key in use, by its public half where the private one is elsewhere, and former ones. Raises UsageError."""
    found = [keys.load_public_for(Path(config.operator.key_file))]
    for i, text in enumerate(config.operator.former_keys):
        try:
            found.append(keys.parse_public_key(text))
        except ValueError as error:
            raise ConfigError(FILE, f"operator.former_keys[{i}]", f"is no public key: {error}") from None
    return found
