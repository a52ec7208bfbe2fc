"""The page's chapters on what all that is worth: checks, keys, software, what is not here, frameworks, how to check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.fleet.evidence.format import frameworks as mapping
from agent.fleet.evidence.format.frameworks import PointSupport
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

_MAX_ROWS = 40
PRIVACY_NOTE = (
    "No reading of any sensor is in this folder, no result of a model and no label: neither a value nor a picture nor "
    "a sound that was measured. Messages that are here hold counts, effect sizes, metrics and sentences about them."
)


def render_checks(facts: EvidenceFacts) -> Markup:
    report = facts.audit
    lead = "All that the collector stores was verified again when this folder was made: signatures, order, gaps."
    verdict = badge("passed", "ok") if report["passed"] else badge("failed", "bad")
    refused = sum(row["count"] for row in facts.refusals)
    rows: list[Sequence[Content]] = [
        ["Messages checked", f"{report['messages']:,}", "each against the key of the device that says it sent it"],
        ["That do not verify", f"{report['invalid_count']:,}", "altered, moved, or signed by no enrolled key"],
        ["Messages missing", f"{report['undeclared_gaps']:,}", "ranges without any explanation by the device"],
        ["Given up by devices", f"{report['gaps_count'] - report['undeclared_gaps']:,}",
         "ranges that a device says, signed, it deleted or lost"],
        ["Readings used twice", f"{report['duplicates']:,}", "or messages that are stored twice"],
        ["Decisions that do not verify", f"{report['invalid_decisions_count']:,}",
         f"of {report['decisions']:,} about roll-outs that operators signed"],
        ["Refused on arrival", f"{refused:,}", "did not verify, and were never counted as messages"],
    ]  # fmt: skip
    reasons = sorted(facts.refusals, key=lambda row: -row["count"])[:_MAX_ROWS]
    listed = []
    if reasons:
        cells: list[Sequence[Content]] = [
            [
                row["device"] or "unknown",
                row["reason"],
                f"{row['count']:,}",
                format_time(row["first"]),
                format_time(row["last"]),
            ]
            for row in reasons
        ]
        listed = [
            details("What was refused", table(["In whose name", "Why", "How often", "First", "Last"], cells, (2,)))
        ]
    said = element("p", "The audit ", verdict, Markup(" (" + link("audit.json").html + ")."))
    return chapter("checks", "Can it be believed?", lead, said, table(["", "", ""], rows, (1,)), *listed)


def render_keys(facts: EvidenceFacts) -> Markup:
    lead = "Whose signature counts. A key is named by its thumbprint; the keys themselves are in the manifest."
    former = {key.kid for key in [key for key in facts.keys if key.role == "operator"][1:]}
    roles: list[Sequence[Content]] = [
        [key.role, element("code", key.kid), _ROLE_TEXTS[key.role] if key.kid not in former else _FORMER_KEY_TEXT]
        for key in facts.keys
        if key.role != "device"
    ]
    of_devices = [key for key in facts.keys if key.role == "device"]
    now = [key for key in of_devices if not key.revoked and key.through is None]
    over = [key for key in of_devices if key.revoked or key.through is not None]
    rows: list[Sequence[Content]] = [
        [key.owner, element("code", key.kid), format_time(key.since), _key_state(key)]
        for key in [*over, *now][:_MAX_ROWS]
    ]
    said = (
        f"{format_count(len(now), 'device key')} in force, {len(over):,} revoked or replaced."
        if of_devices
        else "No device is enrolled."
    )
    listed = details("Keys of devices", table(["Device", "Key", "Since", "State"], rows)) if rows else Markup("")
    rest = overflow_link(len(of_devices) - _MAX_ROWS, "manifest.json")
    parts = [
        table(["Role", "Key", "What it signs"], roles),
        element("p", said),
        listed,
        *rest,
        *_render_signature_chain(facts),
    ]
    return chapter("keys", "Keys in force", lead, *parts)


_FORMER_KEY_TEXT = "decisions of before: another key has followed it"
_ROLE_TEXTS = {
    "operator": "this folder, commands, what devices should run, and where it likes models",
    "collector": "acknowledgements: devices delete what they confirm",
    "publisher": "models",
}


def _key_state(key: Any) -> str:
    if key.revoked:
        return f"revoked {format_time(key.revoked)}"
    return "in force" if key.through is None else f"replaced; counts up to its message {key.through:,}"


def _render_signature_chain(facts: EvidenceFacts) -> list[Markup]:
    if not facts.signature_chain.signatures:
        return [element("p", "Models were not published through a repository of this fleet.", css_class="muted")]
    rows: list[Sequence[Content]] = [
        [
            nowrap(f"{one.role} {one.version}"),
            f"{len(one.signed)} of the {len(one.keys)} keys that {_role_label(one.by)} lists; {one.threshold} must",
            format_names([key[:12] + "…" for key in one.signed], 5),
            format_time(one.expires),
        ]
        for one in facts.signature_chain.signatures
    ]
    lead = (
        "Devices take only what these signatures lead to, each role signed as the one before asks, from the first root "
        "that a device was given."
    )
    signed = stacked_table(table(["Role", "Signed by", "Keys", "Counts until"], rows), "signatures")
    bundles: list[Sequence[Content]] = [
        [nowrap(f"{one.name} {one.version}"), one.role, element("code", one.digest[:23] + "…")]
        for one in facts.signature_chain.targets[-_MAX_ROWS:]
    ]
    listed = [table(["Model", "Published by role", "Digest"], bundles)] if bundles else []
    rest = overflow_link(len(facts.signature_chain.targets) - _MAX_ROWS, "published.json")
    return [element("h3", "Who published models"), element("p", lead), signed, *listed, *rest]


def _role_label(file: str) -> str:
    """`2.root.json` as people say it."""
    version, role, _ = file.split(".", 2)
    return f"{role} {version}"


def render_software(sbom: Sbom, facts: EvidenceFacts) -> Markup:
    lead = (
        "The agent and the libraries it stands on, as installed on the machine that made this folder. Devices tell "
        "their agent's version only; their libraries can differ."
    )
    versions = sorted({one.agent or "not told" for one in facts.running_tasks})
    said = (
        f"{format_count(sbom.component_count, 'package')} and {format_count(sbom.model_count, 'model')}, as a CycloneDX 1.6 bill of "
        "materials: "
    )
    on_devices = (
        f"Agent versions that devices told: {format_names(versions)}." if versions else "No device told its version."
    )
    licences = sorted(sbom.licence_counts.items(), key=lambda entry: (-entry[1], entry[0]))
    rows: list[Sequence[Content]] = [[name, f"{n:,}"] for name, n in licences]
    if sbom.unlicensed:
        rows.append([f"none named: {format_names(sbom.unlicensed)}", f"{len(sbom.unlicensed):,}"])
    listed = details("Licences, as packages name them", table(["Licence", "Packages"], rows, (1,)))
    return chapter(
        "software", "Software", lead, element("p", said, link("sbom.cdx.json"), "."), element("p", on_devices), listed
    )


def render_limitations(facts: EvidenceFacts) -> Markup:
    lead = "What this folder does not show, so that nobody reads more into it than there is."
    items: list[Content] = [Markup(f"<b>Privacy.</b> {PRIVACY_NOTE}")]
    items += [Markup(f"<b>Left out.</b> {text}") for text in list_omissions(facts)]
    items += [Markup(f"<b>Not known.</b> {html.to_html(text)}") for text in list_unknowns(facts)]
    items += [Markup(f"<b>Not covered.</b> {text}") for text in mapping.NOT_COVERED]
    return chapter("not-here", "What is not in here", lead, html.bullet_list(items))


def list_omissions(facts: EvidenceFacts) -> list[str]:
    """What was too much, or must not leave."""
    found = [f"{n:,} {name} were too many for this folder." for name, n in sorted(facts.omitted.items()) if n]
    if facts.withheld:
        found.append(
            f"{format_count(facts.withheld, 'signed message')} in which an operator sent labels: what they say is told in "
            "decisions.jsonl, the messages stay in the database because labels are in them."
        )
    return found


def list_unknowns(facts: EvidenceFacts) -> list[str]:
    found = []
    if facts.rollouts:
        found.append("What two bundles answered beside each other, window by window: devices send sums of it only.")
    if facts.silent_devices:
        found.append(f"What runs on {format_names(facts.silent_devices)}: nothing of it is stored.")
    if facts.unverified:
        found.append(
            f"{format_count(facts.unverified, 'stored message')} did not verify; nothing they say is told here."
        )
    if facts.broken_keys:
        found.append(f"The enrolled key of {format_names(facts.broken_keys)} is none that can be used.")
    if not facts.accuracy:
        found.append("How often models were right in operation: no labels came.")
    if not any(card.evaluated for card in facts.bundles.cards):
        found.append("How good models were before use: no evaluation was given (--evaluation FILE).")
    unchecked = [f"{c.name} {c.version}" for c in facts.bundles.cards if not c.checked]
    if unchecked:
        found.append(f"Who signed {format_names(unchecked)}: the publisher's key was not given (--publisher KEY).")
    if facts.audit["undeclared_gaps"]:
        found.append("What the missing messages said.")
    return found


def render_frameworks(points: Sequence[PointSupport]) -> Markup:
    lead = (
        "Which points of two frameworks the files here support. They are named by number, and told in our own words; "
        "this is no certificate and no substitute for the texts."
    )
    parts = []
    for name in (mapping.NIST, mapping.ISO):
        rows: list[Sequence[Content]] = [_point_row(one) for one in points if one.framework == name]
        parts += [
            element("h3", name),
            stacked_table(
                table(["Point", "What it asks", "Supported by", "What that shows", "What it does not show"], rows),
                "points",
            ),
        ]
    return chapter("frameworks", "NIST AI RMF and ISO/IEC 42001", lead, *parts, element("p", link("mapping.json")))


def _point_row(support: PointSupport) -> list[Content]:
    missing = (
        f'<span class="when">not here: {format_names(support.not_here, 9)}</span>'
        if support.here and support.not_here
        else ""
    )
    here = Markup(format_names(support.here, 9) + missing) if support.here else badge("not by this folder", "none")
    return [
        Markup(f'<b class="fixed">{support.id}</b>'),
        support.asks,
        here,
        support.shows if support.here else "–",
        support.not_shown,
    ]


def render_verification_steps(facts: EvidenceFacts) -> Markup:
    lead = (
        "Nobody has to trust this page. On any machine with the agent, with this folder and the operator's public key:"
    )
    command = element("pre", element("code", "outstation fleet evidence verify FOLDER --key OPERATOR.pub"))
    signer = next((key.kid for key in facts.keys if key.role == "operator"), "")
    text = (
        "It needs no database, no config and no network. It checks the signature over the manifest, every file against "
        "it, each device's signature under each message, that this folder says of them what they say, and the chain of "
        "the operator's decisions. The page itself is covered as a file: it says what the operator's collector "
        "computed. Ask the operator for the key on another way than this folder; its thumbprint must be "
    )
    return chapter("check", "Check it yourself", lead, command, element("p", text, element("code", signer), "."))
