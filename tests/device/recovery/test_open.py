"""Opening of a store: file system, integrity check after an unclean stop, migrations, and its condition."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from outstation import __version__
from outstation.device.recovery import migrate, open
from outstation.device.recovery.open import find_file_system, open_store, require_local
from outstation.device.recovery.report_findings import inspect_condition
from outstation.device.store import label_store
from outstation.device.store.predictions import StoredPredictions
from outstation.device.store.store import Store
from outstation.device.store.tables import schema
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import StorageDamaged, StorageError, UsageError
from outstation.ml.performance.labels import Label
from scripts.kit.stores import append, append_message, filled, opened, pulled, put_aside, served
from tests.kit.stations import ROOT

MOUNTS = """\
22 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw
40 22 0:35 / /mnt/share rw,relatime shared:9 - nfs4 server:/export rw,vers=4.2
41 22 0:36 / /mnt/with\\040space rw shared:10 - cifs //server/x rw
42 40 0:37 / /mnt/share/local rw - ext4 /dev/sda1 rw
43 22 0:38 / /srv/remote rw - fuse.sshfs pi@host:/ rw
44 22 0:39 / /mnt/over rw - nfs server:/a rw
45 22 0:40 / /mnt/over rw - tmpfs tmpfs rw
malformed line
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib/outstation", "ext4"),
        ("/mnt/share/data", "nfs4"),
        ("/mnt/sharedata", "ext4"),
        ("/mnt/share/local/data", "ext4"),
        ("/mnt/with space/data", "cifs"),
        ("/srv/remote", "fuse.sshfs"),
        ("/mnt/over/data", "tmpfs"),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_its_innermost_mount(folder: str, kind: str) -> None:
    assert find_file_system(Path(folder), MOUNTS)[0] == kind


def test_a_network_file_system_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_local(tmp_path)
    monkeypatch.setattr(open, "_read_mountinfo", lambda: f"50 22 0:41 / {tmp_path.resolve()} rw - nfs server:/x rw")
    with pytest.raises(UsageError, match="network file system \\(nfs\\)"):
        open_store(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_only_an_unclean_stop_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = open._quick_check

    def look(db: sqlite3.Connection, arguments: str) -> str | None:
        looked.append(arguments)
        return real(db, arguments)

    monkeypatch.setattr(open, "_quick_check", look)
    store, _ = filled(tmp_path / "live", chunks=3, messages=2, acknowledged=0)
    cut = pulled(tmp_path / "live", tmp_path / "cut")
    store.close()
    opened(tmp_path / "live")[0].close()
    assert not looked
    opened(cut)[0].close()
    assert looked[-1] == "(1)"
    assert "('meta')" in looked


def test_a_store_that_cannot_be_looked_through_in_time_opens_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path / "live", chunks=30, messages=2, acknowledged=0)
    cut = pulled(tmp_path / "live", tmp_path / "cut")
    store.close()
    monkeypatch.setattr(open, "CHECK_TIMEOUT_S", -1.0)
    monkeypatch.setattr(open, "_PROGRESS_STEPS", 1)
    store, _ = opened(cut)
    assert len(served(store)) == 300
    store.close()


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "outstation.db")) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    before = (tmp_path / "outstation.db").read_bytes()
    with pytest.raises(UsageError, match="of another program"):
        open_store(tmp_path)
    assert (tmp_path / "outstation.db").read_bytes() == before


def test_only_a_test_can_ask_for_less_than_full_synchronization(tmp_path: Path) -> None:
    store = open_store(tmp_path, synchronous="NORMAL")
    assert store._fetch_one("PRAGMA synchronous") == (1,)
    store.close()
    assert not [path for path in (ROOT / "agent/outstation").rglob("cli/**/*.py") if "synchronous" in path.read_text()]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="data_dir"):
        open_store(tmp_path / "data")


# --- older and newer versions


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store made by a version that knew the first migration only, with labels in it."""
    folder = tmp_path / "older"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        store, _ = filled(folder, chunks=3, messages=5, acknowledged=2)
    row = np.arange(1, 4, dtype=np.int64)
    with store.transaction() as tx:
        tx.labels.store_predictions("judge", StoredPredictions("sha256:a", row, row, row % 2, None, None, {}), 0.0)
        prediction = tx.labels.find_by_row("judge", 2)
        assert prediction is not None
        tx.labels.store_label("judge", Label(2, None, "high"), prediction, 7)
    store.close()
    assert indexes(folder) == []
    return folder


def indexes(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "outstation.db")) as db:
        return [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE name = 'label_rows'")]


def backup_of(folder: Path) -> Path:
    return folder / f"outstation.db.before-{__version__}"


def check_content(store: Store) -> None:
    assert served(store) == {n: n for n in range(1, 31)}
    assert [message.seq for message in store.unacknowledged_messages(0, 10)] == [3, 4, 5]
    assert (store.backlog().messages, store.cursor("judge"), store.source_position("files", "a.csv")) == (3, 25, 17)
    [label] = store.query(label_store.load_labelled, "judge", "sha256:a", 1, 10)
    assert (label.label, label.prediction.row) == ("high", 2)


def test_an_older_store_is_migrated_with_everything_in_it(older: Path) -> None:
    store, author = opened(older)
    check_content(store)
    assert put_aside(store, author) == []
    assert indexes(older) == ["label_rows"]
    with contextlib.closing(sqlite3.connect(backup_of(older))) as db:
        assert db.execute("SELECT count(*) FROM chunks").fetchone() == (4,)
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'label_rows'").fetchone() == (0,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert append_message(store, author, "in the new version") == 6
    append(store, "numbers", 10)
    store.close()
    assert not backup_of(older).exists()
    store, author = opened(older)
    assert len(served(store)) == 40
    store.close()


def test_an_older_store_is_read_before_the_agent_migrates_it(older: Path) -> None:
    with Store.open_read_only(older) as store:
        check_content(store)
    assert indexes(older) == []


def test_an_older_store_with_other_columns_is_not_called_damaged(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_note(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE labels ADD COLUMN note TEXT")

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, add_note))
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, "add_note"))
    with pytest.raises(StorageError, match="made by an older version of outstation; the agent migrates it") as raised:
        Store.open_read_only(older)
    assert not isinstance(raised.value, StorageDamaged)


def test_an_older_store_with_a_damaged_description_is_called_damaged(older: Path) -> None:
    with contextlib.closing(sqlite3.connect(older / "outstation.db")) as db, db:
        db.execute("ALTER TABLE cursors RENAME COLUMN first_row TO first_ro")
    with pytest.raises(StorageDamaged, match="the description of cursors is not what was written"):
        Store.open_read_only(older)


def test_a_store_of_a_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    opened(tmp_path)[0].close()
    with contextlib.closing(sqlite3.connect(tmp_path / "outstation.db")) as db, db:
        db.execute("INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('outstation-device', 'telepathy')")
    with pytest.raises(StorageError, match="made by a newer version") as raised:
        Store.open_read_only(tmp_path)
    assert not isinstance(raised.value, StorageDamaged)


def test_a_migration_that_fails_restores_the_old_store(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM outbox")
        raise sqlite3.OperationalError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, failing))
        with pytest.raises(StorageError, match="The store is as it was before, nothing is lost"):
            open_store(older)
    assert indexes(older) == []
    store, _ = opened(older)
    check_content(store)
    store.close()


def test_a_migration_that_loses_rows_is_undone(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM outbox WHERE seq = 4")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, losing))
        with pytest.raises(StorageError, match="outbox has 4 rows instead of 5"):
            open_store(older)
    store, _ = opened(older)
    check_content(store)
    store.close()


_MIGRATES = """\
import os, sys
from pathlib import Path
from outstation.device.recovery.open import open_store
from outstation.device.store.tables import schema

def dying(db):
    migration(db)
    if db.execute("PRAGMA database_list").fetchone()[2]:
        os._exit(9)

migration = schema.MIGRATIONS[-1]
dying.__name__ = migration.__name__
schema.MIGRATIONS = (*schema.MIGRATIONS[:-1], dying)
open_store(Path(sys.argv[1]))
"""


def test_a_migration_that_was_killed_is_repeated(older: Path) -> None:
    command = [sys.executable, "-c", _MIGRATES, str(older)]
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 9
    assert backup_of(older).exists()
    store, _ = opened(older)
    check_content(store)
    assert indexes(older) == ["label_rows"]
    store.close()


def test_a_new_store_is_made_in_one_go_without_a_backup(tmp_path: Path) -> None:
    opened(tmp_path)[0].close()
    assert indexes(tmp_path) == ["label_rows"]
    assert not backup_of(tmp_path).exists()


@pytest.mark.parametrize("mode", ["DELETE", "MEMORY"])
def test_a_power_cut_while_a_store_is_made_leaves_one_that_opens(tmp_path: Path, mode: str) -> None:
    """Cut it while pages of the tables are written, and between the tables and the write-ahead log."""
    made, cut = tmp_path / "made.db", tmp_path / "cut"
    cut.mkdir()
    with contextlib.closing(sqlite3.connect(made, isolation_level=None)) as db:
        # So that pages are written before the transaction ends.
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN")
        migrate.apply(db)
        if mode == "MEMORY":
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode=MEMORY")
        for end in ("", "-journal"):
            if (left := Path(f"{made}{end}")).exists():
                (cut / f"outstation.db{end}").write_bytes(left.read_bytes())
    assert (cut / "outstation.db").stat().st_size > 0
    assert (cut / "outstation.db-journal").exists() == (mode == "DELETE")
    store, _ = opened(cut)
    assert inspect_condition(store).last_finding is None
    append(store, "numbers", 3)
    store.close()


def test_a_store_of_a_newer_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    opened(tmp_path)[0].close()
    with contextlib.closing(sqlite3.connect(tmp_path / "outstation.db")) as db, db:
        db.execute("INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('outstation-device', 'telepathy')")
    with pytest.raises(UsageError, match="newer version of outstation \\(it has telepathy"):
        open_store(tmp_path)
    assert not list(tmp_path.glob("*.before-*"))


def test_a_backup_is_whole_before_it_has_its_name(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        with contextlib.closing(sqlite3.connect(older / "outstation.db")) as db, pytest.raises(KeyboardInterrupt):
            migrate.migrate(db, older / "outstation.db")
    assert not backup_of(older).exists()
    store, _ = opened(older)
    check_content(store)
    store.close()


# --- what people are told


def test_the_condition_says_how_it_was_left_and_what_was_salvaged(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "live", chunks=12, messages=12, acknowledged=0)
    assert inspect_condition(store).last_stop == ""  # a new store was never stopped
    cut = pulled(tmp_path / "live", tmp_path / "cut", store, emptied=True)
    with contextlib.closing(opened(pulled(tmp_path / "live", tmp_path / "second", store, emptied=True))[0]) as second:
        assert inspect_condition(second).last_stop == "unclean"
    store.close()
    with contextlib.closing(Store.open_read_only(tmp_path / "live")) as read:
        assert (
            inspect_condition(read).last_stop,
            inspect_condition(read).last_finding,
            inspect_condition(read).quarantine,
        ) == ("clean", None, None)
    data = bytearray((cut / "outstation.db").read_bytes())
    data[:100] = bytes(100)
    (cut / "outstation.db").write_bytes(data)
    opened(cut)[0].close()
    with contextlib.closing(Store.open_read_only(cut)) as read:
        result = inspect_condition(read)
    assert result.last_stop == "clean"
    assert result.last_finding is not None
    assert "file is not a database" in result.last_finding["summary"]
    assert result.quarantine == cut / "quarantine"
    assert result.quarantine_bytes >= len(data)


def test_check_and_status_show_it(tmp_path: Path) -> None:
    config = tmp_path / "outstation.toml"
    data = tmp_path / "data"
    config.write_text(f'[device]\nid = "pi-07"\nfleet = "acme"\ndata_dir = "{data}"\n')
    store, _ = filled(tmp_path / "live", chunks=3, messages=2, acknowledged=0)
    pulled(tmp_path / "live", data, store, emptied=True)
    store.close()
    (data / "outstation.db").write_bytes(b"x" * 8192)
    opened(data)[0].close()
    ran = CliRunner().invoke(cli, ["check", "-c", str(config), "--json"])
    [line] = [line for line in json.loads(ran.stdout) if line["name"] == "store"]
    assert line["state"] == "warning"
    assert f"{data}/quarantine holds" in line["detail"]
    ran = CliRunner().invoke(cli, ["status", "-c", str(config), "--json"])
    reported = json.loads(ran.stdout)["condition"]
    assert reported["last_stop"] == "clean"
    assert reported["quarantine"]["folder"] == str(data / "quarantine")
    text = CliRunner().invoke(cli, ["status", "-c", str(config)]).stdout
    assert "The store was damaged" in text


@pytest.mark.parametrize(
    ("folder_mode", "before", "expected"),
    [(0o755, None, 0o600), (0o755, 0o644, 0o600), (0o750, None, 0o640), (0o750, 0o644, 0o640), (0o700, 0o600, 0o600)],
)
def test_readings_made_by_hand_are_for_their_owner_and_those_of_a_service_for_its_group(
    tmp_path: Path, folder_mode: int, before: int | None, expected: int
) -> None:
    umask = os.umask(0o022)
    try:
        tmp_path.chmod(folder_mode)
        if before is not None:
            open_store(tmp_path).close()
            (tmp_path / "outstation.db").chmod(before)
        store = open_store(tmp_path)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(umask)
    assert {mode for name, mode in modes.items() if name.startswith("outstation.db")} == {expected}
    assert [name for name, mode in modes.items() if mode & 0o007] == []


def test_a_data_folder_made_by_hand_is_for_its_owner(tmp_path: Path) -> None:
    open_store(tmp_path / "data").close()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
