"""Operator commands: names, arguments and limits, shared by operators and devices."""

from __future__ import annotations

import msgspec

# Longest time from `issued` to `expires`. It bounds how long a copied command works on a restored store.
MAX_LIFETIME_S = 24 * 3600
# Devices reject a larger command unread. A command with labels is the longest.
MAX_COMMAND_BYTES = 16_384
MAX_ARGUMENT_LENGTH = 12_000
DEFAULT_SCHEDULE = "default"


class CommandArguments(msgspec.Struct, frozen=True):
    """Members of `args`, all texts, in the order of the command line."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


COMMANDS: dict[str, CommandArguments] = {
    "run": CommandArguments(("task",)),
    "pause": CommandArguments(("task",)),
    "resume": CommandArguments(("task",)),
    "report": CommandArguments(),
    "set-schedule": CommandArguments(("task", "schedule")),
    "rollback": CommandArguments(("task",)),
    "relearn": CommandArguments(("task",), ("for",)),
    "reset-reference": CommandArguments(("task",)),
    "accept-reference": CommandArguments(("task",)),
    # `labels`: JSON columns, as in a label line at the intake; `by`: who gave them.
    "label": CommandArguments(("task", "labels"), ("by",)),
    # `row`: the result.
    "sample": CommandArguments(("task", "row")),
    "rotate-key": CommandArguments(),
    # PEM, for the TLS key that the device has.
    "install-certificate": CommandArguments(("certificate",)),
    "wipe": CommandArguments((), ("confirm",)),
    "cancel-wipe": CommandArguments(),
}
# Commands of the roles in `outstation.protocol.wire.trust`; None: all of them.
ROLE_COMMANDS: dict[str, frozenset[str] | None] = {
    "operator": None,
    "deployer": frozenset({"report", "rollback"}),
    "reporter": frozenset({"report"}),
}
# Refused while the clock is unsynced, because the device cannot tell whether they have expired.
CLOCK_DEPENDENT = frozenset({"rollback", "rotate-key", "wipe"})


def may_command(role: str, name: str) -> bool:
    """Return True if a key of `role` may send the command."""
    allowed = ROLE_COMMANDS.get(role, frozenset())
    return allowed is None or name in allowed


def check_args(name: str, args: dict[str, str]) -> None:
    """Check the name and arguments of a command. Raises ValueError with the fix."""
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name[:60]!r}; known are {', '.join(COMMANDS)}")
    known = COMMANDS[name]
    missing = [argument for argument in known.required if argument not in args]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    unknown = sorted(set(args) - set(known.required) - set(known.optional))
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(unknown)[:120]}")
