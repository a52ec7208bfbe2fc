"""Direct start of `run` and `batch`: click, whose import takes some 10 ms, parses only what is not plain."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from typing import Any

_COMMANDS = {"run": "outstation.device.cli.run:run", "batch": "outstation.device.cli.batch:batch"}
# Flag → parameter.
_FLAGS = {"run": {"-v": "verbose", "--verbose": "verbose"}, "batch": {"--json": "as_json"}}


def parse(words: Sequence[str]) -> dict[str, Any] | None:
    """Return the parameters of the command in `words`; None if click has to parse it, or to say what is wrong."""
    command, rest = words[0], iter(words[1:])
    flags = _FLAGS[command]
    parameters: dict[str, Any] = {"config_file": None, **dict.fromkeys(flags.values(), False)}
    if command == "batch":
        parameters["task"] = None
    for word in rest:
        if word in flags:
            parameters[flags[word]] = True
        elif word in ("-c", "--config"):
            parameters["config_file"] = next(rest, None)
            if parameters["config_file"] is None:
                return None
        elif word.startswith("--config="):
            parameters["config_file"] = word.partition("=")[2]
        elif word.startswith("-c"):
            parameters["config_file"] = word[2:]
        elif word.startswith("-") or parameters.get("task", word) is not None:
            return None
        else:
            parameters["task"] = word
    return parameters


def run(command: str, parameters: dict[str, Any]) -> None:
    """Run a command with parameters that `parse` returned."""
    import_command(_COMMANDS[command])(**parameters)


def import_command(place: str) -> Any:
    """Import `module:name`, after which garbage is collected again."""
    module, _, name = place.partition(":")
    command = getattr(importlib.import_module(module), name)
    if not gc.isenabled():
        # Modules stay until the end: the first collection need not look through all that they hold.
        gc.freeze()
        gc.enable()
    return command
