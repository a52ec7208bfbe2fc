"""Command `outstation head`: the signed end of the device's message log, for an auditor."""

from __future__ import annotations

import click

from outstation.device.bootstrap import device
from outstation.foundation.cli.options import config_options
from outstation.foundation.cli.output import echo, emit


@click.command(epilog="Example: outstation head --json >pi-07.head.json")
@config_options
def head(config_file: str | None, as_json: bool) -> None:
    """Sign where the message log ends: seq, digest and time, with the device's own key.

    An auditor who gets the JSON from the device can tell later whether the operator shows the same log:
    `fleet evidence verify --witness FILE`. It needs no network, and no daemon.
    """
    import msgspec

    from outstation.device.health import quote_acknowledgement
    from outstation.device.machine.timekeeping import make_clock
    from outstation.foundation.clock import to_rfc3339
    from outstation.protocol.documents import log_head

    file, conf = device.load_config(config_file)
    key = device.load_key_files(file, conf).load_active()
    with device.open_store_read_only(conf) as store:
        now = make_clock(store)()
        seq, digest = store.log_head()
        statement = log_head.LogHead(
            fleet=conf.device.fleet,
            device=conf.device.id,
            log=store.log_id,
            seq=seq,
            digest=digest,
            time=to_rfc3339(now.wall_us),
            clock=now.quality,
            key=key.public.text,
            acknowledged=quote_acknowledgement(store),
        )
    signed = log_head.sign(statement, key)
    document = {
        "payload": signed.payload.decode(),
        "jws": signed.jws,
        "thumbprint": key.public.kid,
        "head": msgspec.to_builtins(statement),
    }
    lines = [
        f"{conf.device.id} in fleet {conf.device.fleet}, log {statement.log}",
        f"seq         {seq}",
        f"digest      {digest or '(no message yet)'}",
        f"time        {statement.time}, clock {statement.clock}",
        f"thumbprint  {key.public.kid}",
        f"signature   {signed.jws}",
        "For an auditor: outstation head --json >FILE; fleet evidence verify --witness FILE",
    ]
    emit(document, as_json, lambda: echo("\n".join(lines)))
