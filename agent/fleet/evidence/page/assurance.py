"""Chapters on assurance: audit, keys, software, limitations, framework mapping, and how to verify the folder."""

from __future__ import annotations

from collections.abc import Sequence

from agent.fleet.evidence.format import frameworks
from agent.fleet.evidence.format.frameworks import PointSupport
from agent.fleet.evidence.format.manifest import TrustedKey
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.gather.sbom import Sbom
from agent.fleet.evidence.page.elements import (
    badge,
    chapter,
    details,
    format_count,
    format_names,
    format_time,
    link,
    nowrap,
    overflow_link,
    stacked_table,
)
from agent.render import html
from agent.render.html import Content, Markup, element, table
from agent.render.svg import html_text

_MAX_ROWS = 40
_ROLE_TEXTS = {
    "operator": "this folder, commands, desired state, and optionally models",
    "collector": "acknowledgements: devices delete what the collector confirms",
    "publisher": "models",
}
_FORMER_KEY_TEXT = "earlier decisions; a newer key replaced it"
_PRIVACY_NOTE = (
    "This folder holds no sensor reading, no result and no label: no measured value, image or sound. Its messages hold "
    "counts, effect sizes, metrics and sentences about them."
)


def render_checks(facts: EvidenceFacts) -> Markup:
    report = facts.audit
    lead = "When this folder was made, everything in the collector's database was verified: signatures, order, gaps."
    verdict = badge("passed", "ok") if report["passed"] else badge("failed", "bad")
    declared_gaps = report["gaps_count"] - report["undeclared_gaps"]
    refused = sum(row["count"] for row in facts.refusals)
    rows: list[Sequence[Content]] = [
        ["Messages checked", f"{report['messages']:,}", "each against the key of its device"],
        ["Invalid messages", f"{report['invalid_count']:,}", "altered, moved, or not signed by an enrolled key"],
        ["Missing messages", f"{report['undeclared_gaps']:,}", "ranges that no device declared as deleted or lost"],
        ["Declared gaps", f"{declared_gaps:,}", "ranges that a device declared, signed, as deleted or lost"],
        ["Duplicates", f"{report['duplicates']:,}", "readings used twice or messages stored twice"],
        ["Invalid decisions", f"{report['invalid_decisions_count']:,}",
         f"of {report['decisions']:,} signed roll-out decisions"],
        ["Refused on arrival", f"{refused:,}", "did not verify and were never stored as messages"],
    ]  # fmt: skip
    text = element("p", "The audit ", verdict, Markup(f" ({link('audit.json').html})."))
    refusals: list[Sequence[Content]] = []
    for row in sorted(facts.refusals, key=lambda row: -row["count"])[:_MAX_ROWS]:
        times = (format_time(row["first"]), format_time(row["last"]))
        refusals.append([row["device"] or "unknown", row["reason"], f"{row['count']:,}", *times])
    head = ["Claimed device", "Reason", "Count", "First", "Last"]
    listed = [details("Refused messages", table(head, refusals, (2,)))] if refusals else []
    return chapter("checks", "Checks", lead, text, table(["", "", ""], rows, (1,)), *listed)


def render_keys(facts: EvidenceFacts) -> Markup:
    lead = "Keys whose signatures count, by thumbprint. The public keys are in the manifest."
    operators = [key.kid for key in facts.keys if key.role == "operator"]
    roles: list[Sequence[Content]] = [
        [key.role, element("code", key.kid), _FORMER_KEY_TEXT if key.kid in operators[1:] else _ROLE_TEXTS[key.role]]
        for key in facts.keys
        if key.role != "device"
    ]
    device_keys = [key for key in facts.keys if key.role == "device"]
    retired = [key for key in device_keys if key.revoked or key.last_valid_seq is not None]
    valid = [key for key in device_keys if key not in retired]
    text = "No device is enrolled."
    if device_keys:
        text = f"{format_count(len(valid), 'device key')} valid, {len(retired):,} revoked or replaced."
        by_operator = sum(key.made_by == "operator" for key in device_keys)
        if by_operator:
            text += f" The operator made {by_operator:,} of them, and can sign what those devices could."
    rows: list[Sequence[Content]] = [
        [key.owner, element("code", key.kid), key.made_by, format_time(key.since), _key_state(key)]
        for key in [*retired, *valid][:_MAX_ROWS]
    ]
    head = ["Device", "Key", "Made by", "Since", "State"]
    return chapter(
        *("keys", "Keys", lead),
        stacked_table(table(["Role", "Key", "Signs"], roles), "roles"),
        element("p", text),
        *([details("Device keys", stacked_table(table(head, rows), "keys"))] if rows else []),
        *overflow_link(len(device_keys) - _MAX_ROWS, "manifest.json"),
        *_render_signature_chain(facts),
    )


def _key_state(key: TrustedKey) -> str:
    if key.revoked:
        return f"revoked {format_time(key.revoked)}"
    return "valid" if key.last_valid_seq is None else f"replaced; valid up to message {key.last_valid_seq:,}"


def _render_signature_chain(facts: EvidenceFacts) -> list[Markup]:
    chain = facts.signature_chain
    if not chain.signatures:
        return [element("p", "This fleet published no model through a repository.", css_class="muted")]
    rows: list[Sequence[Content]] = [
        [
            nowrap(f"{role.role} {role.version}"),
            f"{len(role.signed_keys)} of {len(role.keys)} keys that {_role_label(role.delegator)} lists; "
            f"{role.threshold} required",
            format_names([key[:12] + "…" for key in role.signed_keys], 5),
            format_time(role.expires),
        ]
        for role in chain.signatures
    ]
    lead = (
        "Devices install only what this chain of signatures (TUF) leads to. It starts at the first root metadata, "
        "which a device receives at enrolment."
    )
    signed = stacked_table(table(["Role", "Signed by", "Keys", "Expires"], rows), "signatures")
    targets: list[Sequence[Content]] = [
        [nowrap(f"{target.name} {target.version}"), target.role, element("code", target.digest[:19] + "…")]
        for target in chain.targets[-_MAX_ROWS:]
    ]
    listed = [table(["Model", "Role", "Digest"], targets)] if targets else []
    rest = overflow_link(len(chain.targets) - _MAX_ROWS, "published.json")
    return [element("h3", "Published models"), element("p", lead), signed, *listed, *rest]


def _role_label(file: str) -> str:
    """Return `root 2` for `2.root.json`."""
    version, role, _ = file.split(".", 2)
    return f"{role} {version}"


def render_software(sbom: Sbom, facts: EvidenceFacts) -> Markup:
    lead = (
        "The agent and its libraries as installed on the machine that made this folder. Devices report only their "
        "agent version, so their libraries can differ."
    )
    counts = f"{format_count(sbom.component_count, 'package')} and {format_count(sbom.model_count, 'model')}"
    versions = sorted({task.agent or "unknown" for task in facts.running_tasks})
    on_devices = (
        f"Agent versions on devices: {format_names(versions)}." if versions else "No device reported a version."
    )
    licences = sorted(sbom.licence_counts.items(), key=lambda entry: (-entry[1], entry[0]))
    rows: list[Sequence[Content]] = [[name, f"{n:,}"] for name, n in licences]
    if sbom.unlicensed:
        rows.append([f"none declared: {format_names(sbom.unlicensed)}", f"{len(sbom.unlicensed):,}"])
    return chapter(
        *("software", "Software", lead),
        element("p", f"Bill of materials (CycloneDX 1.6) with {counts}: ", link("sbom.cdx.json"), "."),
        element("p", on_devices),
        details("Licences as packages declare them", table(["Licence", "Packages"], rows, (1,))),
    )


def render_limitations(facts: EvidenceFacts) -> Markup:
    lead = "What this folder does not show."
    items: list[Content] = [Markup(f"<b>Privacy.</b> {_PRIVACY_NOTE}")]
    items += [Markup(f"<b>Omitted.</b> {html_text(text)}") for text in list_omissions(facts)]
    items += [Markup(f"<b>Unknown.</b> {html_text(text)}") for text in list_unknowns(facts)]
    items += [Markup(f"<b>Not covered.</b> {html_text(text)}") for text in frameworks.NOT_COVERED]
    return chapter("not-here", "Limitations", lead, html.bullet_list(items))


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
        sentences.append(f"The models on {format_names(facts.silent_devices)}: no report is stored.")
    if facts.unverified:
        count = format_count(facts.unverified, "stored message")
        sentences.append(f"The content of {count} with an invalid signature, which this folder ignores.")
    if facts.broken_keys:
        sentences.append(f"The key of {format_names(facts.broken_keys)}: the enrolled key is invalid.")
    if not facts.accuracy:
        sentences.append("Accuracy in operation: no labels arrived.")
    if not any(card.evaluated_at for card in facts.bundles.cards):
        sentences.append("Model quality before deployment: no evaluation was given (--evaluation FILE).")
    unverified = [f"{card.name} {card.version}" for card in facts.bundles.cards if not card.signature_verified]
    if unverified:
        sentences.append(
            f"The signer of {format_names(unverified)}: the publisher's key was not given (--publisher KEY)."
        )
    if facts.audit["undeclared_gaps"]:
        sentences.append("The content of the missing messages.")
    return sentences


def render_frameworks(points: Sequence[PointSupport]) -> Markup:
    lead = (
        "Points of two frameworks that files in this folder support, by number and paraphrased. This is no certificate "
        "and no substitute for the frameworks."
    )
    head = ["Point", "Requirement", "Supported by", "Demonstrates", "Limitations"]
    parts = []
    for name in (frameworks.NIST, frameworks.ISO):
        rows: list[Sequence[Content]] = []
        for point in points:
            if point.framework != name:
                continue
            support: list[Content] = [badge("not supported", "none"), "–"]
            if point.files_present:
                missing = format_names(point.files_missing, 9)
                note = f'<span class="when">missing: {missing}</span>' if missing else ""
                support = [Markup(format_names(point.files_present, 9) + note), point.demonstrates]
            identity = Markup(f'<b class="fixed">{point.id}</b>')
            rows.append([identity, point.requirement, *support, point.limitations])
        parts += [element("h3", name), stacked_table(table(head, rows), "points")]
    return chapter("frameworks", "NIST AI RMF and ISO/IEC 42001", lead, *parts, element("p", link("mapping.json")))


def render_verification_steps(facts: EvidenceFacts) -> Markup:
    lead = "Nobody has to trust this page. Use any machine with the agent, this folder and the operator's public key:"
    command = element("pre", element("code", "outstation fleet evidence verify FOLDER --operator OPERATOR.pub"))
    text = (
        "The command needs no database, config or network. It checks the signature of the manifest, every file against "
        "the manifest, the device signature of each message, that the folder's claims match those messages, and the "
        "chain of the operator's decisions. The page is covered as a file: its numbers are those that the operator's "
        "collector computed. Get the operator's key through a different channel than this folder. Its thumbprint must "
        "be "
    )
    signer = next((key.kid for key in facts.keys if key.role == "operator"), "")
    return chapter("check", "Verify this folder", lead, command, element("p", text, element("code", signer), "."))
