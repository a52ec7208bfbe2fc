"""The child process that fetches, as the daemon sees it: started, looked at, killed; never waited for."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence

import msgspec

from agent.device.rollout.fetch.protocol import MAX_RESPONSE_BYTES, FetchRequest, FetchResponse
from agent.device.rollout.fetch.version_floors import VersionFloors

# -P: an `agent` in the folder it happens to run in is not ours.
WORKER_COMMAND = (sys.executable, "-P", "-m", "agent.device.rollout.fetch.worker")
# The child ends itself in the time it was given; some time later it is killed.
_GRACE_S = 30.0


class FetchProcess:
    """One request to be answered; `now_s` is on the boot-time clock. Raises OSError where no process can be had."""

    def __init__(self, request: FetchRequest, now_s: float, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._deadline_s, self._killed = now_s + request.timeout_s + _GRACE_S, False
        # Files, not pipes: nobody has to read along.
        with tempfile.TemporaryFile() as asked:
            asked.write(msgspec.json.encode(request))
            asked.seek(0)
            self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            try:
                self._process = subprocess.Popen(command, stdin=asked, stdout=self._stdout, stderr=self._stderr)
            except OSError:
                self._close()
                raise

    def has_ended(self, now_s: float) -> bool:
        """Whether it has ended; it is killed where it should have."""
        if self._process.poll() is not None:
            return True
        if now_s >= self._deadline_s:
            self.kill()
        return False

    def kill(self) -> None:
        self._killed = True
        self._process.kill()

    def read_response(self) -> FetchResponse:
        """What it said before it ended; of one that said nothing, what it died of."""
        self._stdout.seek(0)
        try:
            found = msgspec.json.decode(self._stdout.read(MAX_RESPONSE_BYTES), type=FetchResponse)
        except msgspec.MsgspecError:
            found = FetchResponse(
                error="TimeOver" if self._killed else "Died", detail=self._describe_death(), floors=VersionFloors()
            )
        self._close()
        return found

    def kill_and_wait(self) -> None:
        """Kill it, and wait until it is gone."""
        self.kill()
        self._process.wait()
        self._close()

    def _describe_death(self) -> str:
        if self._killed:
            return "the child that fetches did not end in time and was killed; what came so far is kept"
        self._stderr.seek(0)
        said = self._stderr.read(MAX_RESPONSE_BYTES).decode(errors="replace").strip()
        return f"the child that fetches ended with {self._process.returncode}: {said[-300:]}"

    def _close(self) -> None:
        self._stdout.close()
        self._stderr.close()
