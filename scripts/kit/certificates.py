"""Expired certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from outstation.fleet.enrolment.pki import CertificateAuthority


def make_expired(certificate: bytes, authority: CertificateAuthority) -> bytes:
    """Return the same certificate (PEM) for the same key, expired an hour ago."""
    old = x509.load_pem_x509_certificate(certificate)
    end = datetime.now(UTC) - timedelta(hours=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(old.serial_number)
        .not_valid_before(end - timedelta(days=30))
        .not_valid_after(end)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(authority.key, None).public_bytes(Encoding.PEM)
