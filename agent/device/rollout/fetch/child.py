"""The child process that fetches, as the daemon sees it: started, looked at, killed; never waited for."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence

import msgspec

from agent.device.rollout.fetch.protocol import MOST_ANSWER, Answer, Request
from agent.device.rollout.fetch.version_floors import Floors

# -P: an `agent` in the folder it happens to run in is not ours.
COMMAND = (sys.executable, "-P", "-m", "agent.device.rollout.fetch.worker")
# The child ends itself in the time it was given; some time later it is killed.
_GRACE_S = 30.0


class Child:
    """One request to be answered; `now_s` is on the boot-time clock. Raises OSError where no process can be had."""

    def __init__(self, request: Request, now_s: float, command: Sequence[str] = COMMAND) -> None:
        self._until_s, self._killed = now_s + request.seconds + _GRACE_S, False
        # Files, not pipes: nobody has to read along.
        with tempfile.TemporaryFile() as asked:
            asked.write(msgspec.json.encode(request))
            asked.seek(0)
            self._said, self._complaint = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            try:
                self._process = subprocess.Popen(command, stdin=asked, stdout=self._said, stderr=self._complaint)
            except OSError:
                self._close()
                raise

    def ended(self, now_s: float) -> bool:
        """Whether it has ended; it is killed where it should have."""
        if self._process.poll() is not None:
            return True
        if now_s >= self._until_s:
            self.kill()
        return False

    def kill(self) -> None:
        self._killed = True
        self._process.kill()

    def answer(self) -> Answer:
        """What it said before it ended; of one that said nothing, what it died of."""
        self._said.seek(0)
        try:
            found = msgspec.json.decode(self._said.read(MOST_ANSWER), type=Answer)
        except msgspec.MsgspecError:
            found = Answer(error="TimeOver" if self._killed else "Died", detail=self._death(), floors=Floors())
        self._close()
        return found

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.kill()
        self._process.wait()
        self._close()

    def _death(self) -> str:
        if self._killed:
            return "the child that fetches did not end in time and was killed; what came so far is kept"
        self._complaint.seek(0)
        said = self._complaint.read(MOST_ANSWER).decode(errors="replace").strip()
        return f"the child that fetches ended with {self._process.returncode}: {said[-300:]}"

    def _close(self) -> None:
        self._said.close()
        self._complaint.close()
