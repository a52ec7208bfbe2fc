"""Certificates of a fleet that end soon: of its devices, as they were issued here, and of its own roles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from agent import clock, input_files
from agent.alerts.kinds import CERTIFICATE_ENDS
from agent.fleet.incidents.conditions import CERTIFICATE_CRITICAL_S, CERTIFICATE_WARNING_S, Condition


class Certificate(msgspec.Struct, frozen=True):
    """A certificate in use; `device` is empty for one of the fleet's own, `end_us` epoch µs."""

    device: str
    name: str
    path: Path
    end_us: int


def list_certificates(home: Path, own: Iterable[Path], devices: Iterable[str]) -> Iterator[Certificate]:
    """Yield the fleet's `own` certificates and the newest one of each device; skip files that hold none."""
    for path in (*own, home / "broker" / "server.crt"):
        if (end_us := _read_end(path)) is not None:
            yield Certificate("", path.name, path, end_us)
    for device in devices:
        # What was issued later than this, the device has not confirmed.
        path = home / "devices" / device / "device.crt"
        if (end_us := _read_end(path)) is not None:
            yield Certificate(device, "device", path, end_us)


def find_ending(certificates: Iterable[Certificate], now_us: int) -> list[Condition]:
    """Return a condition for each certificate that ends soon or has ended."""
    findings = []
    for certificate in certificates:
        left_s = (certificate.end_us - now_us) / 1e6
        if left_s >= CERTIFICATE_WARNING_S:
            continue
        end = clock.to_rfc3339(certificate.end_us)[:10]
        verb = "ended" if left_s < 0 else "ends"
        owner = certificate.device or "the fleet"
        summary = f"The TLS certificate {certificate.path} of {owner} {verb} on {end}; the broker refuses it then."
        severity = "critical" if left_s < CERTIFICATE_CRITICAL_S else "warning"
        findings.append(
            Condition(CERTIFICATE_ENDS, certificate.device, summary, severity, {"name": certificate.name})  # type: ignore[arg-type]
        )
    return findings


def _read_end(path: Path) -> int | None:
    # Of the collector's modules, only this check reads certificates.
    from cryptography import x509

    try:
        end = x509.load_pem_x509_certificate(input_files.read_bytes(path)).not_valid_after_utc
    except (OSError, ValueError):
        return None
    return round(end.timestamp() * 1e6)
