"""Mapping from files of an evidence folder to points of NIST AI RMF 1.0 and ISO/IEC 42001:2023.

Point numbers are those of the frameworks. Requirements are short paraphrases and no substitute for the texts. Points
for which software produces no evidence (policies, effects on people, staff training) are not listed; see
`NOT_COVERED`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

NIST = "NIST AI RMF 1.0"
ISO = "ISO/IEC 42001:2023, annex A"
FrameworkPart = Literal["Govern", "Map", "Measure", "Manage", "Annex A"]

_RUNNING, _DECISIONS, _INCIDENTS = "running.json", "decisions.jsonl", "incidents.json"
_HISTORY, _COMPARISONS, _PUBLISHED = "history.json", "comparisons.json", "published.json"
_DRIFT, _ACCURACY, _AUDIT, _SBOM = "drift.json", "accuracy.json", "audit.json", "sbom.cdx.json"
_MESSAGES, _REPOSITORY, _MANIFEST = "messages/", "repository/", "manifest.json"
_CARDS, _DATA_CARDS, _EVALUATIONS = "MODEL_CARD.md", "DATA_CARD.md", "evaluation.json"


class FrameworkPoint(msgspec.Struct, frozen=True):
    """Point of a framework. Each of `files` supports it; the name of a bundle document stands for every bundle's."""

    framework: str
    part: FrameworkPart
    id: str
    requirement: str
    files: tuple[str, ...]
    demonstrates: str
    limitations: str


def _nist(
    part: FrameworkPart, number: str, requirement: str, files: tuple[str, ...], demonstrates: str, limitations: str
) -> FrameworkPoint:
    return FrameworkPoint(NIST, part, f"{part.upper()} {number}", requirement, files, demonstrates, limitations)


def _iso(number: str, requirement: str, files: tuple[str, ...], demonstrates: str, limitations: str) -> FrameworkPoint:
    return FrameworkPoint(ISO, "Annex A", f"A.{number}", requirement, files, demonstrates, limitations)


POINTS = (
    _nist(
        "Govern", "1.4", "Risk management follows transparent policies, procedures and controls.",
        (_DECISIONS, _MANIFEST), "Which changes were made, by which signed procedure, on which numbers.",
        "The organization's policies and risk priorities.",
    ),
    _nist(
        "Govern", "1.5", "Ongoing monitoring and periodic review are planned, with roles and frequency.",
        (_DRIFT, _ACCURACY, _INCIDENTS), "That models were monitored in operation, and since when.",
        "Who reviews the results and how often; the organization decides that.",
    ),
    _nist(
        "Govern", "1.6", "AI systems are inventoried.",
        (_RUNNING, _HISTORY, _SBOM), "Every model that the fleet's devices report, with its digest.",
        "Systems outside this fleet.",
    ),
    _nist(
        "Govern", "6.1", "Risks of third-party software and data are addressed.",
        (_SBOM,), "Third-party software in the agent, with version and licence.",
        "Whether the licences suit the use, and known vulnerabilities: no vulnerability database is consulted.",
    ),
    _nist(
        "Map", "2.1", "The system's tasks and methods are defined.",
        (_CARDS,), "The kind, inputs and outputs of each bundle.", "Why a model was chosen at all.",
    ),
    _nist(
        "Map", "2.2", "The system's knowledge limits and the intended human oversight are documented.",
        (_CARDS, _DATA_CARDS), "Intended use and limits as the author states them.",
        "Whether people at the sites know and follow them.",
    ),
    _nist(
        "Map", "2.3", "Test methods and test data are documented.",
        (_DATA_CARDS, _EVALUATIONS), "Data, split, metrics with intervals, leakage checks.",
        "That the data represent the sites; drift shows how far the sites differ.",
    ),
    _nist(
        "Map", "4.1", "Risks of components, including those of third parties, are mapped.",
        (_SBOM,), "The components and their declared licences.", "A legal assessment.",
    ),
    _nist(
        "Measure", "2.1", "Test sets, metrics and test tools are documented.",
        (_EVALUATIONS, _DATA_CARDS), "The evaluation document as the tool wrote it.",
        "Tests made with other tools.",
    ),
    _nist(
        "Measure", "2.3", "Performance is measured under conditions similar to deployment.",
        (_ACCURACY,), "Metrics from the sites, with intervals, where labels arrived.",
        "Sites and periods without labels.",
    ),
    _nist(
        "Measure", "2.4", "The system's behaviour is monitored in production.",
        (_DRIFT, _INCIDENTS, _MESSAGES), "Input and output drift, and the alerts that devices raised and signed.",
        "Changes that no detector tests for.",
    ),
    _nist(
        "Measure", "2.5", "The system is shown to be valid and reliable, with documented limits.",
        (_EVALUATIONS, _CARDS, _ACCURACY), "Offline metrics, the author's stated limits, metrics in operation.",
        "That the system is good enough for its purpose, which is a judgement.",
    ),
    _nist(
        "Measure", "2.6", "The system can fail safely, is monitored in real time, and failures are handled in time.",
        (_INCIDENTS, _DECISIONS), "How long incidents lasted; which models were rolled back, and why.",
        "A safety analysis of the use of readings and results.",
    ),
    _nist(
        "Measure", "2.7", "Security and resilience are evaluated and documented.",
        (_AUDIT, _MANIFEST, _PUBLISHED, _REPOSITORY),
        "That stored messages verify, which keys count, what was refused, who may publish models.",
        "A penetration test; the security of broker, network and machines.",
    ),
    _nist(
        "Measure", "3.1", "Risks are tracked over time in deployment.",
        (_DRIFT, _ACCURACY, _INCIDENTS), "How often, where and how long inputs and accuracy deviated.",
        "Risks that readings, results and labels do not show.",
    ),
    _nist(
        "Manage", "1.1", "It is decided whether the system achieves its purpose and should stay in use.",
        (_DECISIONS, _COMPARISONS), "Each roll-out step with the numbers it was decided on.",
        "Decisions that people took outside the system.",
    ),
    _nist(
        "Manage", "2.4", "A system that behaves unexpectedly can be superseded, disengaged or deactivated.",
        (_DECISIONS, _RUNNING), "Rollbacks, quarantines, pauses and revoked keys, with actor and time.",
        "That the right people knew and could act in time.",
    ),
    _nist(
        "Manage", "4.1", "Post-deployment monitoring is planned and carried out, with change management and recovery.",
        (_DRIFT, _INCIDENTS, _DECISIONS), "Monitoring and changes as carried out.",
        "The plan itself; input from users and other affected people.",
    ),
    _nist(
        "Manage", "4.3", "Incidents and errors are tracked, handled and communicated.",
        (_INCIDENTS, _MESSAGES), "Incidents with start, end and the device's signature.",
        "To whom they were communicated.",
    ),
    _iso(
        "4.2", "The resources of an AI system are documented.",
        (_RUNNING, _SBOM, _CARDS), "Devices, models, software.", "People, and computing used for training.",
    ),
    _iso(
        "4.4", "The tools of an AI system are documented.",
        (_SBOM,), "The agent and its libraries, with versions.", "Training and data preparation tools.",
    ),
    _iso(
        "6.2.4", "Systems are verified and validated by defined measures.",
        (_EVALUATIONS, _CARDS), "Offline evaluation with intervals, where one was given.",
        "Acceptance criteria beyond the rules of a roll-out.",
    ),
    _iso(
        "6.2.5", "Deployment follows a plan whose requirements are met first.",
        (_DECISIONS, _RUNNING, _HISTORY), "Roll-outs step by step, and which device runs which model since when.",
        "Requirements that the roll-out rules do not contain.",
    ),
    _iso(
        "6.2.6", "Operation is monitored; repairs, updates and support are provided.",
        (_DRIFT, _ACCURACY, _INCIDENTS, _DECISIONS), "Monitoring, incidents and updates in the covered period.",
        "Support, and how people are reached.",
    ),
    _iso(
        "6.2.7", "Technical documentation is available to those who need it.",
        (_CARDS, _DATA_CARDS), "Model and data cards of each bundle, covered by its signature.",
        "Documentation of the product that contains the device.",
    ),
    _iso(
        "6.2.8", "Event logs are recorded, at least while the system is in use.",
        (_MESSAGES, _AUDIT, _DECISIONS), "Signed, chained logs of each device, and the audit of all stored messages.",
        "How long the organization keeps its database.",
    ),
    _iso(
        "7.4", "Data quality requirements are defined, and data are checked against them.",
        (_DATA_CARDS, _DRIFT), "The author's data card; sensor faults and drift at the sites.",
        "Data requirements written elsewhere.",
    ),
    _iso(
        "7.5", "The provenance of data is recorded.",
        (_DATA_CARDS,), "Sources of training and test data as the author states them.",
        "The sources themselves; nothing here proves them.",
    ),
    _iso(
        "8.2", "Users get the information about the system that they need.",
        ("index.html", _CARDS), "This page and the cards.", "Whether users received them.",
    ),
    _iso(
        "8.4", "A plan exists for communicating incidents to users.",
        (_INCIDENTS,), "The incidents that such a plan would cover.", "The plan.",
    ),
    _iso(
        "10.3", "Supplied products and services fit the organization's approach to AI.",
        (_SBOM, _PUBLISHED, _REPOSITORY), "Third-party components; whose key signed each model.",
        "Agreements with suppliers.",
    ),
)  # fmt: skip

NOT_COVERED = (
    "Policies, roles, staff training, risk tolerance and management reviews: software produces no evidence of these.",
    "Effects on people and society, fairness between groups of people, legal and ethical assessment.",
    "Whether the purpose is right, and how results are used after they leave the collector.",
    "How models were trained, beyond what their authors state in the cards.",
    "Known vulnerabilities of the listed software.",
    "Environmental cost of training and operation.",
)


class PointSupport(msgspec.Struct, frozen=True):
    """Point with the files of a folder that support it. Without any, the folder does not support the point."""

    framework: str
    part: FrameworkPart
    id: str
    requirement: str
    files_present: list[str]
    files_missing: list[str]
    demonstrates: str
    limitations: str


def evaluate_support(paths: Collection[str], empty_paths: Collection[str] = ()) -> list[PointSupport]:
    """Return each point with its present and missing files.

    `paths` are the folder's files. `empty_paths` are files without content to rely on, such as a comparison list
    without entries; they count as missing. A folder is named with its trailing slash.
    """
    support = []
    for point in POINTS:
        present = [name for name in point.files if name not in empty_paths and _is_present(name, paths)]
        missing = [name for name in point.files if name not in present]
        head = (point.framework, point.part, point.id, point.requirement)
        support.append(PointSupport(*head, present, missing, point.demonstrates, point.limitations))
    return support


def _is_present(name: str, paths: Collection[str]) -> bool:
    if name in ("index.html", _MANIFEST):
        return True
    if name.endswith("/"):
        return any(path.startswith(name) for path in paths)
    return name in paths or any(path.startswith("bundles/") and path.endswith(f"/{name}") for path in paths)
