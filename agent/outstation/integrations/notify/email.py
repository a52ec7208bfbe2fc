"""Mail: one text/plain message by SMTP with STARTTLS or TLS. Its Message-ID stays the same when it is sent again."""

from __future__ import annotations

import smtplib
import ssl
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime

from outstation.foundation import clock
from outstation.integrations.notify.config import EmailTarget
from outstation.integrations.notify.delivery import TIMEOUT_S, SendFailed, describe, limit_total, read_secret
from outstation.integrations.notify.message import Notification, shorten


def build(target: EmailTarget, message: Notification) -> EmailMessage:
    """Return the mail. Its texts are printable already; the policy refuses a line break in a header."""
    mail = EmailMessage(policy=SMTP)
    mail["From"], mail["To"] = target.sender, ", ".join(target.to)
    mail["Subject"] = message.subject
    mail["Date"] = format_datetime(clock.to_datetime(clock.parse_rfc3339(message.time)))
    mail["Message-ID"] = f"<{message.key}@{target.sender.rpartition('@')[2]}>"
    # No out-of-office reply (RFC 3834).
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.text)
    return mail


def check(target: EmailTarget) -> str:
    """Return a line about the target. Raises UsageError."""
    if target.password_file:
        read_secret(target.password_file, "a mail password")
    return f"mail to {', '.join(target.to)} over {target.host}:{target.effective_port}, {target.security}"


def send(target: EmailTarget, message: Notification) -> None:
    """Send the mail to all recipients. Raises SendFailed, and UsageError for a password that cannot be read."""
    password = read_secret(target.password_file, "a mail password") if target.password_file else None
    mail = build(target, message)
    name = f"{target.host}:{target.effective_port}"
    server: smtplib.SMTP | None = None
    try:
        with limit_total(lambda: server.sock if server is not None else None):
            context = ssl.create_default_context(cafile=target.ca_file)
            if target.security == "tls":
                server = smtplib.SMTP_SSL(timeout=TIMEOUT_S, context=context)
            else:
                server = smtplib.SMTP(timeout=TIMEOUT_S)
            # For SNI and the certificate's name; `connect` does not set it.
            server._host = target.host  # type: ignore[attr-defined]
            server.connect(target.host, target.effective_port)
            if target.security == "starttls":
                server.starttls(context=context)
            if password is not None and target.username is not None:
                server.login(target.username, password)
            refused = server.send_message(mail)
        _check_recipients(name, refused, len(target.to))
    except smtplib.SMTPAuthenticationError as error:
        raise SendFailed(f"{name}: refuses user name and password ({error.smtp_code})") from None
    except smtplib.SMTPRecipientsRefused as error:
        _check_recipients(name, error.recipients, len(target.to))
    except smtplib.SMTPResponseException as error:
        problem = f"{name}: answers {error.smtp_code} {_decode(error.smtp_error)}".rstrip()
        raise SendFailed(problem, is_rejected=error.smtp_code in (552, 554)) from None
    except (OSError, smtplib.SMTPException, UnicodeError) as error:
        raise SendFailed(f"{name}: {describe(error)}") from None
    finally:
        if server is not None:
            # The message is accepted or not by now; a server that is slow to say goodbye changes nothing.
            server.close()


def _check_recipients(name: str, refused: dict[str, tuple[int, bytes]], wanted: int) -> None:
    """Raise SendFailed if nobody gets the mail; to send it again to all because one is refused would be worse."""
    if len(refused) < wanted:
        return
    code, text = next(iter(refused.values()))
    raise SendFailed(f"{name}: refuses all {wanted} recipients: {code} {_decode(text)}".rstrip())


def _decode(answer: bytes | str) -> str:
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    return shorten(text, 200)
