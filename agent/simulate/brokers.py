"""MQTT broker of a simulated fleet: Mosquitto if it is installed, else an embedded broker from pip."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from agent.errors import UsageError


def mosquitto_command(folder: Path) -> list[str] | None:
    """Return the command that runs Mosquitto with the config in `folder`; None if it is not installed."""
    binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if binary is None:
        return None
    conf = folder / "broker" / "mosquitto.conf"
    if os.geteuid() == 0:
        # As root, Mosquitto switches to a user who cannot read a private folder.
        conf.write_text(conf.read_text(encoding="utf-8") + "user root\n", encoding="utf-8")
    return [binary, "-c", str(conf)]


def start_embedded(folder: Path, port: int) -> Any:
    """Start the embedded broker on `port`. Raises UsageError if it is not installed."""
    try:
        from iotcore import Broker as Embedded
    except ImportError:
        raise UsageError(
            "no MQTT broker is installed: apt-get install mosquitto, or pip install 'outstation[demo]'"
        ) from None
    file = folder / "broker.toml"
    file.write_text(_RUMQTTD_CONFIG.format(port=port), encoding="utf-8")
    broker = Embedded(config_path=str(file))
    broker.start()
    return broker


_RUMQTTD_CONFIG = """\
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 500
dynamic_filters = true
"""
