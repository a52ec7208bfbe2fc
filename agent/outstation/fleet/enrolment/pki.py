"""Certificate authority of a fleet, and the TLS certificates and CRLs it issues (Ed25519, X.509 v3, RFC 5280).

TLS decides who may connect to the broker. It does not authenticate messages: their signatures do, with another key that
survives bridges, brokers and disks and is revoked in the fleet database. The broker reads revoked certificates from a
CRL.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outstation.foundation import clock, input_files
from outstation.foundation.errors import UsageError

CA_YEARS = 10
# Certificates of the broker and the fleet's roles, which an operator can reach.
LEAF_LIFETIME = timedelta(days=3650)
# `fleet devices renew` renews it over MQTT while RENEW_BEFORE or less is left of it.
DEVICE_LIFETIME, RENEW_BEFORE = timedelta(days=365), timedelta(days=90)
# Machines without a battery clock start in the past; a day covers the lag of a saved clock.
BACKDATE = timedelta(days=1)
_RESTORE_HINT = "a new list would accept revoked certificates again; restore it from a backup or from its copy"


class IssuedCertificate(msgspec.Struct, frozen=True):
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class CertificateAuthority(msgspec.Struct, frozen=True):
    certificate: x509.Certificate
    key: Ed25519PrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return _private_pem(self.key)

    def issue_server(self, host: str) -> IssuedCertificate:
        """Issue a broker's certificate for `host`, also valid for localhost."""
        names = [_general_name(name) for name in dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))]
        key = Ed25519PrivateKey.generate()
        certificate = self._issue(host, names, ExtendedKeyUsageOID.SERVER_AUTH, key.public_key())
        return IssuedCertificate(certificate, _private_pem(key))

    def issue_client(self, name: str, fleet: str, lifetime: timedelta = LEAF_LIFETIME) -> IssuedCertificate:
        """Issue a client's certificate with a new key; the broker uses `name` from its CN as the user name."""
        key = Ed25519PrivateKey.generate()
        return IssuedCertificate(self.certify_client(name, fleet, key.public_key(), lifetime), _private_pem(key))

    def certify_client(
        self, name: str, fleet: str, key: Ed25519PublicKey, lifetime: timedelta = LEAF_LIFETIME
    ) -> bytes:
        """Issue a client's certificate (PEM) for a `key` whose private half stays where it was made."""
        uri = x509.UniformResourceIdentifier(f"urn:outstation:{fleet}:{name}")
        return self._issue(name, [uri], ExtendedKeyUsageOID.CLIENT_AUTH, key, lifetime)

    def build_crl(self, editions: Sequence[x509.CertificateRevocationList], serials: Iterable[int]) -> bytes:
        """Build the next CRL (PEM): all entries of these editions, and `serials`."""
        entries = {entry.serial_number: entry for edition in editions for entry in edition}
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_now())
            entries.setdefault(serial, entry.build())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(_crl_time(editions))
            # An expired list would reject every client.
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(max((_crl_number(edition) for edition in editions), default=0) + 1), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )
        for revoked in entries.values():
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(self.key, None).public_bytes(Encoding.PEM)

    def load_crl(self, file: Path) -> x509.CertificateRevocationList:
        """Load a CRL (PEM). Raises UsageError if it is unreadable, or signed by another authority."""
        try:
            crl = x509.load_pem_x509_crl(input_files.read_bytes(file))
            genuine = crl.is_signature_valid(self.certificate.public_key())  # type: ignore[arg-type]
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file}: cannot be read as a revocation list: {error}; {_RESTORE_HINT}") from None
        if not genuine:
            raise UsageError(f"{file}: is not signed by this fleet's authority; {_RESTORE_HINT}")
        return crl

    def _issue(
        self,
        common_name: str,
        names: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        key: Ed25519PublicKey,
        lifetime: timedelta = LEAF_LIFETIME,
    ) -> bytes:
        end = min(_now() + lifetime, self.certificate.not_valid_after_utc)
        builder = (
            _certificate_builder(_x509_name(common_name[:64]), self.certificate.subject, key, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        return builder.sign(self.key, None).public_bytes(Encoding.PEM)


def create_authority(fleet: str) -> CertificateAuthority:
    """Create a self-signed authority that may sign leaf certificates only."""
    key = Ed25519PrivateKey.generate()
    name = _x509_name(f"outstation {fleet}"[:64])
    builder = (
        _certificate_builder(name, name, key.public_key(), _now() + timedelta(days=365 * CA_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return CertificateAuthority(builder.sign(key, None), key)


def load_authority(cert_file: Path, key_file: Path) -> CertificateAuthority:
    """Load an authority from two PEM files. Raises UsageError that names the invalid file."""
    try:
        certificate = x509.load_pem_x509_certificate(input_files.read_bytes(cert_file))
    except (OSError, ValueError) as error:
        raise UsageError(f"{cert_file}: cannot be read as a certificate: {error}; restore it from a backup") from None
    try:
        key = load_pem_private_key(input_files.read_bytes(key_file), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{key_file}: cannot be read as a private key: {error}; restore it from a backup") from None
    if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
        raise UsageError(f"{key_file}: does not match {cert_file}; restore both from the same backup of the fleet")
    return CertificateAuthority(certificate, key)


def read_serial(certificate: bytes, file: Path) -> int:
    """Return the serial number of a PEM certificate. Raises UsageError that names the `file`."""
    try:
        return x509.load_pem_x509_certificate(certificate).serial_number
    except ValueError as error:
        hint = "restore it from a backup: without it the certificate cannot be revoked"
        raise UsageError(f"{file}: cannot be read as a certificate: {error}; {hint}") from None


def _crl_time(editions: Sequence[x509.CertificateRevocationList]) -> datetime:
    """Return a time in the past: a broker whose clock lags rejects every client if the list is from the future.

    It is after the last edition, because OpenSSL with two editions in memory uses the older of two with one time.
    """
    start = _now() - BACKDATE
    passed = [edition.last_update_utc for edition in editions if edition.last_update_utc < _now()]
    return max([start, *(time + timedelta(seconds=1) for time in passed)])


def _crl_number(edition: x509.CertificateRevocationList) -> int:
    try:
        return edition.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        # Another tool signed it with this authority's key, as `openssl ca -gencrl` does: its entries are valid.
        return 0


def require_set_clock(now_us: int) -> None:
    """Raise UsageError while the clock is not set: certificates would have ended, and times of enrolment stay wrong."""
    if now_us < clock.BUILD_FLOOR_US:
        raise UsageError(
            f"the clock of this machine is not set, it is {clock.to_rfc3339(now_us)[:10]}: certificates would end "
            "before they are used; set it by NTP or `date -s`, and run this again"
        )


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey, end: datetime
) -> x509.CertificateBuilder:
    require_set_clock(int(_now().timestamp()) * 1_000_000)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _x509_name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
