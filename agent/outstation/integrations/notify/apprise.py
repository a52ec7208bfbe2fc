"""Apprise: more than a hundred services by one URL each, such as ntfy, Telegram, Slack and Matrix."""

from __future__ import annotations

import logging

from outstation.foundation.errors import UsageError
from outstation.foundation.extras import install_command
from outstation.integrations.notify.config import AppriseTarget
from outstation.integrations.notify.delivery import SendFailed, read_secret
from outstation.integrations.notify.message import Notification

_TYPES = {"critical": "failure", "warning": "warning", "info": "info"}


def load_service(target: AppriseTarget) -> tuple[object, str]:
    """Return Apprise with the service, and the service's name. Raises UsageError."""
    try:
        import apprise
    except ModuleNotFoundError:
        fix = f"install it: {install_command('notify')}"
        raise UsageError(f"a target of kind apprise needs the package apprise; {fix}") from None
    # Its log has URLs with their credentials.
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
    url = read_secret(target.url_file, "the URL of a service, as Apprise documents it")
    service = apprise.Apprise()
    if not service.add(url):
        scheme = url.partition(":")[0][:20] if "://" in url else ""
        raise UsageError(f"{target.url_file}: Apprise takes no such URL{f' of scheme {scheme!r}' if scheme else ''}")
    return service, url.partition(":")[0]


def check(target: AppriseTarget) -> str:
    """Return a line about the target. Raises UsageError."""
    _, scheme = load_service(target)
    return f"Apprise, service {scheme}"


def send(target: AppriseTarget, message: Notification) -> None:
    """Send the message as plain text. Raises SendFailed and UsageError."""
    service, scheme = load_service(target)
    kind = "success" if message.kind == "recovery" else _TYPES[message.severity]
    try:
        is_sent = service.notify(  # type: ignore[attr-defined]
            body=message.text, title=message.subject, notify_type=kind, body_format="text", interpret_escapes=False
        )
    except Exception as error:
        # A plugin of Apprise may raise anything; its text may hold the URL.
        raise SendFailed(f"{scheme}: fails with {type(error).__name__}") from None
    if not is_sent:
        raise SendFailed(f"{scheme}: did not accept the message; Apprise says no more")
