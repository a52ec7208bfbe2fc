"""Launcher of a sensor program: gives up the ways to gain privilege, then becomes the program.

The kernel ends the program with the thread that started it. This file runs by its path, without the package.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    # Programs with the set-user-ID bit, such as sudo, then run as the same user.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        sys.exit(f"the kernel does not keep it from gaining privilege: {os.strerror(ctypes.get_errno())}")
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # When the machine runs out of memory, the kernel kills this process before the daemon.
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
