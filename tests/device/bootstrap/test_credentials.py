"""Keys that systemd hands to the service as credentials, in place of the files beside the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outstation.device import config
from outstation.device.bootstrap import device, invited
from outstation.device.cli.doctor.fixes import find_fixes
from outstation.device.commands.erasure import MARKER
from outstation.device.config.config import Config
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys

CONFIG = """\
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"

[broker]
url = "mqtts://localhost:8883"
cert_file = "device.crt"
tls_key_file = "device-tls.key"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "outstation.toml").write_text(CONFIG, encoding="utf-8")
    return tmp_path / "outstation.toml"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the credentials that this process has."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def load(file: Path) -> Config:
    return device.load_config(str(file))[1]


def test_the_service_takes_its_keys_from_its_credentials(file: Path, given: Path) -> None:
    key = keys.generate(given / "device.key")
    (given / "device-tls.key").write_bytes(keys.create().pem)
    conf = load(file)
    assert conf.broker.tls_key_file == str(given / "device-tls.key")
    assert device.load_key_files(file, conf).load_active().public.text == key.public.text


def test_without_a_credential_of_that_name_the_files_stay_in_use(file: Path, given: Path) -> None:
    key = keys.generate(file.parent / "device.key")
    (given / "other").write_bytes(b"secret")
    conf = load(file)
    assert conf.broker.tls_key_file == str(file.parent / "device-tls.key")
    assert device.load_key_files(file, conf).load_active().public.text == key.public.text


def test_a_command_without_the_credentials_says_where_the_key_is(file: Path) -> None:
    (file.parent / "device.key.cred").write_bytes(b"sealed")
    with pytest.raises(UsageError, match=r"only the service can open .*device\.key\.cred"):
        device.device_key_path(file, load(file))


def test_a_sealed_key_is_never_replaced_by_a_new_one(file: Path) -> None:
    (file.parent / "device.key.cred").write_bytes(b"sealed")
    with pytest.raises(UsageError, match="would shut the device out; first run: systemd-creds decrypt"):
        invited.make_request(file.parent, "acme", "pi-07", None)
    assert [fix.name for fix in find_fixes(file, load(file), None) if fix.name == "key"] == []


def test_a_wipe_erases_the_sealed_key(file: Path, given: Path) -> None:
    sealed, public = file.parent / "device.key.cred", file.parent / "device.key.pub"
    keys.generate(given / "device.key", write_public=False)
    sealed.write_bytes(b"sealed")
    public.write_text("public", encoding="ascii")
    conf = load(file)
    marker = device.erase(file, conf, device.device_key_path(file, conf))
    assert (marker["state"], marker["left"]) == ("wiped", [])
    assert not sealed.exists()
    assert not public.exists()
    assert json.loads((config.load(file).data_dir / MARKER).read_bytes())["state"] == "wiped"
