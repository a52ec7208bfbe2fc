"""`outstation fleet dashboard` and `fleet dashboard user`, as people call them."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import re
import signal
import sqlite3
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outstation.fleet.cli.group import fleet
from tests.kit.dashboards import PASSWORD


def run(*arguments: str, password: str = "") -> Result:
    return CliRunner().invoke(fleet, [*arguments], input=f"{password}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert run("init", str(tmp_path / "acme"), "--broker", "mqtt://127.0.0.1:1").exit_code == 0
    return tmp_path / "acme"


def test_accounts_are_added_changed_listed_and_removed(folder: Path) -> None:
    home = ("--dir", str(folder))
    assert run("user", "add", "ada", "--role", "admin", *home, password=PASSWORD).output == "ada was created as admin\n"
    assert run("user", "add", "ada", "--role", "viewer", *home).output == "ada is now viewer\n"
    assert run("user", "add", "proxied", "--no-password", *home).exit_code == 0
    listed = json.loads(run("user", "list", "--json", *home).output)
    assert [(row["name"], row["role"], row["has_password"]) for row in listed] == [
        ("ada", "viewer", True),
        ("proxied", "viewer", False),
    ]
    with contextlib.closing(sqlite3.connect(folder / "fleet.db")) as db:
        stored = db.execute("SELECT password FROM dashboard_users").fetchall()
    assert PASSWORD not in str(stored)
    assert str(stored[0][0]).startswith("scrypt$")
    assert run("user", "password", "ada", *home, password="another long one").exit_code == 0
    assert run("user", "remove", "ada", *home).exit_code == 0
    assert "there is no account 'ada'" in str(run("user", "remove", "ada", *home).exception)


@pytest.mark.parametrize(("name", "password"), [("Ada B", PASSWORD), ("", PASSWORD), ("a", "short"), ("a", "x" * 300)])
def test_a_bad_account_is_refused(folder: Path, name: str, password: str) -> None:
    assert run("user", "add", name, "--dir", str(folder), password=password).exception is not None
    assert json.loads(run("user", "list", "--json", "--dir", str(folder)).output or "[]") == []


def test_beyond_this_machine_it_does_not_start_before_somebody_can_sign_in(folder: Path) -> None:
    run("user", "add", "proxied", "--no-password", "--dir", str(folder))
    refused = run("dashboard", "--listen", "0.0.0.0:0", "--dir", str(folder))
    assert "outstation fleet dashboard user add NAME --role admin" in str(refused.exception)
    assert "belong together" in str(run("dashboard", "--proxy-header", "X-User", "--dir", str(folder)).exception)
    assert "HOST:PORT" in str(run("dashboard", "--listen", "8480", "--dir", str(folder)).exception)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Return files with a certificate of 127.0.0.1, signed by itself, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dash")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    files = folder / "dash.pem", folder / "dash.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pkcs8 = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption()))
    return files


@pytest.mark.process
def test_it_serves_with_tls_and_ends_with_a_signal(folder: Path, tmp_path: Path) -> None:
    run("user", "add", "ada", "--role", "admin", "--dir", str(folder), password=PASSWORD)
    certificate, key = make_certificate(tmp_path)
    command = [
        sys.executable,
        "-m",
        "outstation",
        "fleet",
        "dashboard",
        "--dir",
        str(folder),
        "--listen",
        "127.0.0.1:0",
    ]
    command += ["--login", "--tls-cert", str(certificate), "--tls-key", str(key)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"with the operator's key: https://127\.0\.0\.1:(\d+)/", line)
        assert match is not None, line
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", int(match[1]), timeout=20, context=context)
        form = {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin"}
        connection.request("POST", "/login", f"name=ada&password={PASSWORD.replace(' ', '+')}", form)
        answer = connection.getresponse()
        cookie = answer.getheader("set-cookie") or ""
        assert answer.status == 303
        assert cookie.startswith("__Host-outstation=")
        assert "; Secure" in cookie
        assert answer.getheader("strict-transport-security")
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
    assert (folder / "dashboard.key").stat().st_mode & 0o777 == 0o600
