"""Flaky web server: complete files, ranges, and cut connections."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.workbench.simulate.flaky_web import DeviceConnection, FlakyWebServer

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FlakyWebServer]:
    (tmp_path / "repository" / "targets").mkdir(parents=True)
    (tmp_path / "repository" / "targets" / "a.zip").write_bytes(CONTENT)
    (tmp_path / "repository" / "timestamp.json").write_bytes(b"{}" * 100)
    (tmp_path / "secret").write_bytes(b"not for the web")
    web = FlakyWebServer(tmp_path / "repository", seed=3)
    yield web
    web.close()


def get(web: FlakyWebServer, path: str, **headers: str) -> tuple[int, bytes, str | None]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", web.port, timeout=60)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        body = b""
        try:
            while piece := answer.read1(4096):
                body += piece
        except (ConnectionError, http.client.IncompleteRead):
            pass
        return answer.status, body, answer.getheader("Content-Range")


def test_a_file_comes_whole_and_is_counted(web: FlakyWebServer) -> None:
    assert get(web, "/pi-01/targets/a.zip") == (200, CONTENT, None)
    assert web.connections["pi-01"].sent_bytes == len(CONTENT)


def test_a_range_goes_on_where_a_download_broke_off(web: FlakyWebServer) -> None:
    size = len(CONTENT)
    assert get(web, "/pi-01/targets/a.zip", Range="bytes=70000-") == (
        206,
        CONTENT[70000:],
        f"bytes 70000-{size - 1}/{size}",
    )
    assert get(web, "/pi-01/targets/a.zip", Range="bytes=5-9") == (206, CONTENT[5:10], f"bytes 5-9/{size}")
    assert get(web, "/pi-01/targets/a.zip", Range=f"bytes={size}-")[0] == 416


def test_a_line_with_two_cuts_breaks_twice_and_then_holds(web: FlakyWebServer) -> None:
    web.connections["pi-02"] = DeviceConnection(planned_cuts=2)
    lengths = [len(get(web, "/pi-02/targets/a.zip")[1]) for _ in range(3)]
    assert all(0 < length < len(CONTENT) for length in lengths[:2]), lengths
    assert lengths[2] == len(CONTENT)
    assert web.connections["pi-02"].cut_count == 2
    assert len(get(web, "/pi-01/targets/a.zip")[1]) == len(CONTENT)


def test_a_line_that_is_to_be_cut_lets_metadata_through(web: FlakyWebServer) -> None:
    web.connections["pi-02"] = DeviceConnection(planned_cuts=1)
    assert get(web, "/pi-02/timestamp.json")[1] == b"{}" * 100
    assert web.connections["pi-02"].cut_count == 0


def test_a_slow_line_takes_its_time(web: FlakyWebServer) -> None:
    web.connections["pi-03"] = DeviceConnection(bytes_per_s=200_000.0)
    began = time.monotonic()
    assert len(get(web, "/pi-03/targets/a.zip")[1]) == len(CONTENT)
    assert time.monotonic() - began > 0.9 * len(CONTENT) / 200_000


def test_a_repository_that_is_away_hangs_up_and_comes_back(web: FlakyWebServer) -> None:
    web.offline = True
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        get(web, "/pi-01/timestamp.json")
    web.offline = False
    assert get(web, "/pi-01/timestamp.json")[0] == 200


@pytest.mark.parametrize("path", ["/pi-01/../secret", "/pi-01/%2e%2e/secret", "/pi-01/targets", "/pi-01/", "/"])
def test_nothing_outside_the_folder_is_served(web: FlakyWebServer, path: str) -> None:
    assert get(web, path)[0] == 404
