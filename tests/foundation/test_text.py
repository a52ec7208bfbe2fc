"""Foreign text in everything that people read: terminals, logs, tables, pages."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from pathlib import Path

import pytest

from outstation.foundation import text
from outstation.foundation.cli import output
from outstation.foundation.cli.log_format import PrintableFormatter
from outstation.foundation.render.svg import html_text
from outstation.foundation.text import count_columns, pad

ROOT = Path(__file__).parents[2]
# Colours and titles of a terminal, C1 controls, deletions, bidi overrides, line separators, half a surrogate pair.
HOSTILE = "a\x1b[2J\x1b]0;x\x07b\x9b31mc\x7fd\u202ee\u2066f\u2028g\r\x00\udcff"


def is_plain(shown: str) -> bool:
    return all(line.isprintable() for line in shown.split("\n"))


def test_escape_control_and_bidi_characters_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.echo(f"first\n{HOSTILE}")
    output.print_table([HOSTILE], [[HOSTILE], [1]], "")
    output.print_rejected(0, {1: HOSTILE}, HOSTILE)
    output.emit({"value": HOSTILE.replace("\udcff", "")}, True, lambda: None)
    shown = capsys.readouterr().out
    assert is_plain(shown)
    assert "a\\x1b[2J\\x1b]0;x\\x07b\\x9b31mc\\x7fd\\u202ee\\u2066f\\u2028g\\r\\x00\\udcff" in shown


def test_json_documents_keep_their_content() -> None:
    document = {"a": "é\u202e\U000e0001\x9b", "b": ["\x7f", "\n"]}
    shown = text.printable_json(json.dumps(document, ensure_ascii=False, indent=2))
    assert is_plain(shown)
    assert json.loads(shown) == document


def test_a_log_message_cannot_forge_another_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "name %s", (f"a\nERROR forged\x1b[0m{HOSTILE}",), None)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        failed = logging.LogRecord("x", logging.INFO, "", 0, "failed", (), (ValueError, error, None))
    formatter = PrintableFormatter("%(levelname)s %(message)s")
    shown = formatter.format(record)
    assert shown.isprintable()
    assert shown.startswith("INFO name a\\nERROR forged")
    assert is_plain(formatter.format(failed))


@pytest.mark.parametrize("cell", ['=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(cell: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerow([text.csv_text(cell)])
    (row,) = csv.reader(io.StringIO(out.getvalue()))
    assert row[0].startswith("'")
    assert row[0].isprintable()


@pytest.mark.parametrize("cell", ["", "on", "-1", "+1.5e-3", "-0.25", "a=b", "größe"])
def test_numbers_and_plain_words_stay_as_they_are_in_a_table(cell: str) -> None:
    assert text.csv_text(cell) == cell


def test_hostile_text_is_escaped_in_pages() -> None:
    shown = html_text(f"<script>{HOSTILE}\n")
    assert is_plain(shown)
    assert shown.startswith("&lt;script&gt;a\\x1b[2J")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtts://user:s3cret@broker:8883", "mqtts://***@broker:8883"),
        ("https://user:s3c@ret@host/repository", "https://***@host/repository"),
        ("mqtt://:s3cret@[::1", "mqtt://***@[::1"),
        ("mqtt://broker.local:1883", "mqtt://broker.local:1883"),
        ("mqtt://user:pa/s@cret@host", "mqtt://***@host"),
        ("user:s3cret@host", "***@host"),
    ],
)
def test_a_password_in_a_url_is_masked(url: str, shown: str) -> None:
    assert text.mask_password(url) == shown


def test_every_command_prints_through_the_escaping_functions() -> None:
    raw = re.compile(r"click\.(?:echo|secho)\(|(?<![\w.])print\(|sys\.std(?:out|err)\.write")
    own = {"agent/outstation/foundation/cli/output.py", "agent/outstation/foundation/cli/progress.py"}
    for path in sorted((ROOT / "agent" / "outstation").rglob("cli/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        matches = [f"{name}: {line.strip()}" for line in lines if raw.search(line) and name not in own]
        assert [line for line in matches if "printable" not in line and r'"\r\x1b[K"' not in line] == []


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("pump 7", 6),
        ("振動センサー", 12),
        ("펌프", 4),
        ("ａ", 2),
        ("e\u0301te\u0301", 3),
        ("µ–°", 3),
        ("🚰", 2),
        ("", 0),
    ],
)
def test_double_width_and_combining_characters_are_counted_in_columns(text: str, columns: int) -> None:
    assert count_columns(text) == columns
    assert [pad(text, columns + 3), pad(text, columns + 3, right=True)] == [f"{text}   ", f"   {text}"]
    assert pad(text, 0) == text


def test_tables_of_east_asian_text_stay_aligned_and_within_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    message = "軸受の温度が基準より高い。" * 6
    output.print_table(["sensor", "n", "message"], [["振動センサー", 3, message], ["pump", 12, "ok"]], "")
    head, *lines = capsys.readouterr().out.splitlines()
    assert max(map(count_columns, lines)) in (59, 60)
    starts = [(head, "message"), (lines[0], "軸"), (lines[-1], "ok")]
    assert [count_columns(line.partition(cell)[0]) for line, cell in starts] == [18] * 3
    assert "".join(line.strip() for line in lines[:-1]).endswith(message)
    assert not any(line.lstrip().startswith("。") for line in lines)
