"""Sentences of the page on problems, open matters, omissions and unknowns."""

from __future__ import annotations

from outstation.evidence.gather.gather import EvidenceFacts
from outstation.evidence.page.formats import format_count
from outstation.foundation.text import list_names


def list_problems(facts: EvidenceFacts) -> list[str]:
    """Return a sentence for each finding of the audit, and for each broken signature in the repository."""
    report, problems = facts.audit, []
    if report["invalid_count"]:
        problems.append(f"{format_count(report['invalid_count'], 'stored message')} cannot be verified.")
    if report["invalid_decisions_count"]:
        count = format_count(report["invalid_decisions_count"], "roll-out decision")
        problems.append(f"{count} cannot be verified.")
    if report["undeclared_gaps"]:
        count = format_count(report["undeclared_gaps"], "range")
        problems.append(f"Messages are missing without an explanation ({count}).")
    if report["duplicates"]:
        count = format_count(report["duplicates"], "reading or message", "readings or messages")
        problems.append(f"{count} used or stored twice.")
    return [*problems, *(f"Model repository: {problem}." for problem in facts.repository_problems)]


def list_warnings(facts: EvidenceFacts) -> list[str]:
    """Return a sentence for each open matter: incidents, silent devices, stopped tasks."""
    warnings = []
    for severity, noun in (("critical", "critical incident"), ("warning", "warning")):
        listed = [
            incident for incident in facts.incidents if incident.state == "open" and incident.severity == severity
        ]
        if listed:
            names = sorted({incident.device or "the whole fleet" for incident in listed})
            n = facts.incident_counts[severity, "open"]
            where = list_names(names) if n == len(listed) else f"{', '.join(names[:6])} and others"
            warnings.append(f"{format_count(n, noun)} open: {where}.")
    if facts.silent_devices:
        warnings.append(f"The models on {list_names(facts.silent_devices)} are unknown.")
    stopped = sorted({task.device for task in facts.running_tasks if task.model is None})
    if stopped:
        warnings.append(f"A task is stopped on {list_names(stopped)}.")
    return warnings


def list_omissions(facts: EvidenceFacts) -> list[str]:
    """Return a sentence for each kind of content that exceeds a limit or must not leave the database."""
    sentences = [f"{n:,} {name} above the limit of this folder." for name, n in sorted(facts.omitted.items()) if n]
    if facts.withheld:
        count = format_count(facts.withheld, "signed message")
        sentences.append(
            f"{count} in which an operator sent labels. decisions.jsonl has the summaries; the messages stay in the "
            "database because they contain labels."
        )
    return sentences


def list_unknowns(facts: EvidenceFacts) -> list[str]:
    """Return a sentence for each fact that the database or the given files do not contain."""
    sentences = []
    if facts.rollouts:
        sentences.append("Window-by-window answers of two compared models: devices send only sums.")
    if facts.silent_devices:
        sentences.append(f"The models on {list_names(facts.silent_devices)}: no report is stored.")
    if facts.unverified:
        count = format_count(facts.unverified, "stored message")
        sentences.append(f"The content of {count} with an invalid signature, which this folder ignores.")
    if facts.broken_keys:
        sentences.append(f"The key of {list_names(facts.broken_keys)}: the enrolled key is invalid.")
    if not facts.accuracy:
        sentences.append("Accuracy in operation: no labels arrived.")
    if not any(card.evaluated_at for card in facts.bundles.cards):
        sentences.append("Model quality before deployment: no evaluation was given (--evaluation FILE).")
    unverified = [f"{card.name} {card.version}" for card in facts.bundles.cards if not card.signature_verified]
    if unverified:
        sentences.append(
            f"The signer of {list_names(unverified)}: the publisher's key was not given (--publisher KEY)."
        )
    if facts.audit["undeclared_gaps"]:
        sentences.append("The content of the missing messages.")
    return sentences
