"""The command line. Commands are thin, and loaded only when they are used."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn

# Commands that run models.
_RUN_MODELS = {"run", "batch"}
_exit_code: int | None = None


def main(args: list[str] | None = None) -> NoReturn:
    """Exit 0 done, 1 done and the answer is bad, or not possible here, 2 wrong use or config, 3 data folder moved away.

    An error is one line on standard error, whatever it is.
    """
    if args is None:
        _open_missing_streams()
        # Until the command is imported: that leaves no garbage, and looking for it is a tenth of a command's start.
        gc.disable()
        # First of all, so that what registers later runs before it.
        atexit.register(_end)
    words = sys.argv[1:] if args is None else args
    code = 0
    try:
        code = _run(words)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        code = end.code or 0
    except (Exception, KeyboardInterrupt) as error:
        # Click itself turns an interrupt into an error, but not while modules are imported.
        from outstation.foundation.cli import commands

        code = commands.report_error(error, words)
    global _exit_code
    _exit_code = code
    sys.exit(code)


def _run(words: list[str]) -> int:
    """Run the command and return its exit code. A process for its model starts before anything else is imported."""
    if words and words[0] in _RUN_MODELS:
        from outstation.device.cli import spare
        from outstation.foundation.cli import direct

        parameters = direct.parse(words)
        if parameters is not None:
            with spare.prepared(parameters["config_file"]):
                direct.run(words[0], parameters)
            return 0
    from outstation.foundation.cli.commands import cli

    code = cli.main(words, prog_name="outstation", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _open_missing_streams() -> None:
    """Open standard streams that this process was started without: else files of it get their numbers."""
    # Each has the lowest number that is free.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _end() -> None:
    """End the process at once, with all output written.

    Python would free each object by itself first: 10 to 70 ms, and the memory is given back anyway.
    """
    if _exit_code is not None:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except (OSError, ValueError):
            # Python's own end reports it.
            return
        os._exit(_exit_code)


if __name__ == "__main__":
    main()
