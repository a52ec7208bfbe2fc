"""TLS certificate of the device: that of its config, or a renewed one in the data folder that ends later.

The folder of the config may be read-only for the daemon. Both certificates are for the same key, which stays.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from outstation.device.config import Config, UplinkBrokerConfig
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import RowRejected

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

log = logging.getLogger("outstation")

RENEWED_FILE = "device.crt"


def choose_certificate(conf: Config) -> UplinkBrokerConfig:
    """Return the broker's settings with the certificate of the device that ends last."""
    renewed = conf.data_dir / RENEWED_FILE
    if conf.broker.cert_file is None or not renewed.exists():
        return conf.broker
    try:
        newer, current = _load(input_files.read_bytes(renewed)), _load_current(conf.broker.cert_file)
    except (OSError, ValueError) as error:
        log.error("%s: cannot be read: %s; the certificate of the config is used", renewed, error)
        return conf.broker
    is_newer = newer.public_key() == current.public_key() and _end(newer) > _end(current)
    return replace(conf.broker, cert_file=str(renewed)) if is_newer else conf.broker


def install_certificate(conf: Config, pem: str) -> datetime:
    """Store a renewed certificate for the same key, and return its end. Raises RowRejected, StorageError."""
    current_file = choose_certificate(conf).cert_file
    if current_file is None or conf.broker.ca_file is None:
        raise RowRejected("this device connects without a certificate of its own")
    from cryptography.exceptions import InvalidSignature

    try:
        current, authority = _load_current(current_file), _load_current(conf.broker.ca_file)
        renewed = _load(pem.encode("ascii"))
        renewed.verify_directly_issued_by(authority)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise RowRejected(f"not a certificate of this fleet's authority: {error or 'wrong signature'}") from None
    if renewed.public_key() != current.public_key() or renewed.subject != current.subject:
        raise RowRejected("it is for another key or device")
    if _end(renewed) < _end(current):
        raise RowRejected(f"it ends on {_end(renewed):%Y-%m-%d}, before the one in use")
    if renewed != current:
        durable_files.write(conf.data_dir / RENEWED_FILE, pem.encode("ascii"))
    return _end(renewed)


def read_end(conf: Config) -> datetime | None:
    """Return when the certificate in use ends; None without one that can be read."""
    try:
        file = choose_certificate(conf).cert_file
        return None if file is None else _end(_load_current(file))
    except (OSError, ValueError):
        return None


def _load_current(file: str) -> Certificate:
    return _load(input_files.read_bytes(Path(file)))


def _load(pem: bytes) -> Certificate:
    # Most commands of a device read no certificate.
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem)


def _end(certificate: Certificate) -> datetime:
    return certificate.not_valid_after_utc
