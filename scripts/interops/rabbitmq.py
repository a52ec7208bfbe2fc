"""RabbitMQ 4 as the broker: one collector takes everything; collectors that would share it refuse at once."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import MissingProgram, find_program, run_outstation
from scripts.kit.postgres import run_server

_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_START_TIMEOUT_S = 120.0


@contextmanager
def running_rabbitmq(folder: Path) -> Iterator[int]:
    """Run RabbitMQ with its MQTT plugin and an Erlang port mapper on loopback; return the MQTT port."""
    if not _SERVER.exists():
        raise MissingProgram("rabbitmq-server is not installed: apt-get install rabbitmq-server")
    folder.mkdir(parents=True)
    mqtt, amqp, distribution, mapper = (free_port() for _ in range(4))
    (folder / "plugins").write_text("[rabbitmq_mqtt].\n")
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{amqp}\nmqtt.listeners.tcp.1 = 127.0.0.1:{mqtt}\n"
        "mqtt.allow_anonymous = true\nanonymous_login_user = guest\nanonymous_login_pass = guest\n"
    )
    environment = {
        **os.environ,
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"interop{mqtt}@localhost",
        "RABBITMQ_MNESIA_BASE": str(folder / "db"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(mapper),
    }
    user = []
    if os.geteuid() == 0:
        user = ["setpriv", "--reuid=nobody", "--clear-groups"]
        shutil.chown(folder, "nobody")
        folder.parent.chmod(0o755)
    with (folder / "output").open("wb") as output:
        # A port mapper of our own, which ends with us.
        commands = [
            [find_program("epmd", "erlang-base"), "-port", str(mapper), "-address", "127.0.0.1"],
            [str(_SERVER)],
        ]
        processes = [
            subprocess.Popen(
                [*user, *command], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/",
                start_new_session=True,
            )
            for command in commands
        ]  # fmt: skip
    try:
        wait_until(f"RabbitMQ answers; see {folder}/output", lambda: _is_open(mqtt, processes[1]), _START_TIMEOUT_S)
        yield mqtt
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


def _is_open(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "RabbitMQ ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run(folder: Path) -> None:
    with running_rabbitmq(folder / "rabbitmq") as port, run_server() as postgres:
        broker = MosquittoBroker(folder, port=port)
        link = Link(BrokerConfig(url=broker.url), "asks")
        print(f"  RabbitMQ announces {link.capabilities}")
        link.close()
        with LocalFleet(folder, mosquitto=broker) as fleet:
            device = fleet.add_device("pi-01").add_replay_stream(10**9, 40).add_task("exercise")
            checked = run_outstation("check", "-c", str(device.config))
            [line] = [line for line in checked.stdout.splitlines() if "broker" in line]
            print(f"  check: {line.strip()}")
            assert "no shared subscriptions" in line
            fleet.collector.start()
            device.start_and_wait()
            wait_until("results arrive without --share", lambda: fleet.last_result_row("pi-01") > 200)
            assert device.stop() == 0
            code, report = fleet.audit()
            print(f"  one collector: results to row {fleet.last_result_row('pi-01')}, audit exit code {code}")
            assert code == 0, report
            began = time.monotonic()
            url = postgres.create_database()
            done = run_outstation("fleet", "collect", "--share", "b", "--dir", str(fleet.home), "--db", url)
            seconds = time.monotonic() - began
            print(f"  --share: exit code {done.returncode} after {seconds:.1f} s: {done.stderr.strip()[-420:]}")
            assert done.returncode == 2
            assert "no shared subscriptions" in done.stderr
