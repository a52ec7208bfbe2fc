"""Which file of the folder supports which point of two frameworks, and what it does not show.

Numbers are those of the frameworks; what each asks is told in our own words, shortly, and is no substitute for reading
them. A point without any file here is not supported by this folder. Points that software cannot give evidence for
(policies, impact on people, training of staff …) are not listed one by one; `NOT_COVERED` says so.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

NIST = "NIST AI RMF 1.0"
ISO = "ISO/IEC 42001:2023, annex A"
FrameworkPart = Literal["Govern", "Map", "Measure", "Manage", "Annex A"]

_RUNNING, _DECISIONS, _INCIDENTS = "running.json", "decisions.jsonl", "incidents.json"
_HISTORY, _COMPARED, _PUBLISHED = "history.json", "comparisons.json", "published.json"
_DRIFT, _ACCURACY, _AUDIT, _SBOM = "drift.json", "accuracy.json", "audit.json", "sbom.cdx.json"
_MESSAGES, _REPOSITORY, _MANIFEST = "messages/", "repository/", "manifest.json"
_CARDS, _DATA_CARDS, _EVALUATIONS = "MODEL_CARD.md", "DATA_CARD.md", "evaluation.json"


class FrameworkPoint(msgspec.Struct, frozen=True):
    """`files`: which of these are here supports it; names of bundles' papers stand for all of them."""

    framework: str
    part: FrameworkPart
    id: str
    asks: str
    files: tuple[str, ...]
    shows: str
    not_shown: str


def _nist(
    part: FrameworkPart, number: str, asks: str, files: tuple[str, ...], shows: str, not_shown: str
) -> FrameworkPoint:
    return FrameworkPoint(NIST, part, f"{part.upper()} {number}", asks, files, shows, not_shown)


def _iso(number: str, asks: str, files: tuple[str, ...], shows: str, not_shown: str) -> FrameworkPoint:
    return FrameworkPoint(ISO, "Annex A", f"A.{number}", asks, files, shows, not_shown)


POINTS = (
    _nist(
        "Govern", "1.4", "Risk management is carried out openly, through stated procedures and controls.",
        (_DECISIONS, _MANIFEST), "Which changes were made, by which signed procedure, with which numbers.",
        "The organization's policies and risk priorities.",
    ),
    _nist(
        "Govern", "1.5", "Monitoring and review go on, and who does what how often is planned.",
        (_DRIFT, _ACCURACY, _INCIDENTS), "That models were watched in operation, and since when.",
        "Who reviews this and how often: that is for the organization to set.",
    ),
    _nist(
        "Govern", "1.6", "There is an inventory of AI systems.",
        (_RUNNING, _HISTORY, _SBOM), "Every model that the fleet's devices say they run, with its digest.",
        "Systems outside this fleet.",
    ),
    _nist(
        "Govern", "6.1", "Risks of what comes from third parties are dealt with.",
        (_SBOM,), "Which software of others is part of the agent, in which version, under which licence.",
        "Whether licences suit the use, and known vulnerabilities: the list is not compared with any database.",
    ),
    _nist(
        "Map", "2.1", "What the system does, and by which method, is defined.",
        (_CARDS,), "For each bundle: its kind, its inputs and outputs.", "Why a model was chosen at all.",
    ),
    _nist(
        "Map", "2.2", "The limits of what the system knows, and how people should use its output, are documented.",
        (_CARDS, _DATA_CARDS), "What the author wrote about intended use and limits.",
        "Whether people at the sites know and follow it.",
    ),
    _nist(
        "Map", "2.3", "How the system was tested, and on which data, is documented.",
        (_DATA_CARDS, _EVALUATIONS), "Data, split, metrics with intervals, checks for leakage.",
        "That the data stand for the sites; see drift for how far these differ.",
    ),
    _nist(
        "Map", "4.1", "Risks of the system's components, third parties' among them, are mapped.",
        (_SBOM,), "The components and the licences they name.", "A legal assessment.",
    ),
    _nist(
        "Measure", "2.1", "Test sets, metrics and tools of testing are documented.",
        (_EVALUATIONS, _DATA_CARDS), "The evaluation's document, as the tool wrote it.",
        "Tests that were made with other tools.",
    ),
    _nist(
        "Measure", "2.3", "Performance is measured under conditions like those of use.",
        (_ACCURACY,), "Metrics at the sites themselves, where labels came, with intervals.",
        "Sites and times without labels.",
    ),
    _nist(
        "Measure", "2.4", "The system's behaviour is monitored while it is in production.",
        (_DRIFT, _INCIDENTS, _MESSAGES), "Drift of inputs and outputs, and the alerts that devices raised and signed.",
        "What no detector looks for.",
    ),
    _nist(
        "Measure", "2.5", "The system is shown to be valid and reliable, and the limits of that are documented.",
        (_EVALUATIONS, _CARDS, _ACCURACY), "Offline metrics, limits in the author's words, metrics in operation.",
        "That it is good enough for its purpose: that is a judgement.",
    ),
    _nist(
        "Measure", "2.6", "The system can fail safely, is monitored in real time, and failures are answered in time.",
        (_INCIDENTS, _DECISIONS), "How long incidents lasted; models that were taken back, and why.",
        "A safety analysis of what the readings and results are used for.",
    ),
    _nist(
        "Measure", "2.7", "Security and resilience are evaluated and documented.",
        (_AUDIT, _MANIFEST, _PUBLISHED, _REPOSITORY),
        "That stored messages verify, which keys count, what was refused, who may publish models.",
        "A penetration test; the security of broker, network and machines.",
    ),
    _nist(
        "Measure", "3.1", "Risks are tracked over time, by what systems do where they are used.",
        (_DRIFT, _ACCURACY, _INCIDENTS), "How often, where and how long inputs and accuracy departed from the usual.",
        "Risks that do not show in readings, answers or labels.",
    ),
    _nist(
        "Manage", "1.1", "Whether the system achieves its purpose, and should go on, is determined.",
        (_DECISIONS, _COMPARED), "Each step of a roll-out with the numbers on which it was taken.",
        "Decisions that people took outside the system.",
    ),
    _nist(
        "Manage", "2.4", "A system that behaves otherwise than meant can be replaced, disengaged or deactivated.",
        (_DECISIONS, _RUNNING), "Roll-backs, quarantines, pauses and revoked keys, with who did it and when.",
        "That the right people knew and could act in time.",
    ),
    _nist(
        "Manage", "4.1", "Monitoring after deployment is planned and carried out, with change management and recovery.",
        (_DRIFT, _INCIDENTS, _DECISIONS), "Monitoring and changes as they were carried out.",
        "The plan itself; input from users and others who are affected.",
    ),
    _nist(
        "Manage", "4.3", "Incidents and errors are tracked, answered and communicated.",
        (_INCIDENTS, _MESSAGES), "Incidents with beginning, end and the device's own signature.",
        "Whom they were communicated to.",
    ),
    _iso(
        "4.2", "The resources of an AI system are documented.",
        (_RUNNING, _SBOM, _CARDS), "Devices, models, software.", "People and computing for training.",
    ),
    _iso(
        "4.4", "The tools that are used for an AI system are documented.",
        (_SBOM,), "The agent and its libraries, with versions.", "Tools of training and of data preparation.",
    ),
    _iso(
        "6.2.4", "Systems are verified and validated by stated measures.",
        (_EVALUATIONS, _CARDS), "Offline evaluation with intervals, where one was given.",
        "Criteria of acceptance beyond those of a roll-out.",
    ),
    _iso(
        "6.2.5", "Deployment follows a plan, and its requirements are met before.",
        (_DECISIONS, _RUNNING, _HISTORY), "Roll-outs step by step, and who runs what since.",
        "Requirements that the roll-out's rules do not hold.",
    ),
    _iso(
        "6.2.6", "Operation is monitored; repairs, updates and support are provided for.",
        (_DRIFT, _ACCURACY, _INCIDENTS, _DECISIONS), "Monitoring, incidents and updates of the time told of.",
        "Support and how people are reached.",
    ),
    _iso(
        "6.2.7", "Technical documentation is there for those who need it.",
        (_CARDS, _DATA_CARDS), "Model and data cards of each bundle, with the signature over them.",
        "Documentation of the whole product in which a device is a part.",
    ),
    _iso(
        "6.2.8", "Event logs are kept, at the least while the system is in use.",
        (_MESSAGES, _AUDIT, _DECISIONS), "Signed, chained logs of each device, and the audit of all that is stored.",
        "How long the organization keeps its database.",
    ),
    _iso(
        "7.4", "What data must be like is defined, and data are checked against it.",
        (_DATA_CARDS, _DRIFT), "The author's data card; sensor faults and drift at the sites.",
        "Requirements on data that were written elsewhere.",
    ),
    _iso(
        "7.5", "Where data come from is recorded.",
        (_DATA_CARDS,), "Sources of training and test data, in the author's words.",
        "The sources themselves; nothing here proves them.",
    ),
    _iso(
        "8.2", "Users get the information about the system that they need.",
        ("index.html", _CARDS), "This page and the cards.", "Whether it reached them.",
    ),
    _iso(
        "8.4", "There is a plan of how users are told of incidents.",
        (_INCIDENTS,), "The incidents that a plan would be about.", "The plan.",
    ),
    _iso(
        "10.3", "What suppliers provide is in line with the organization's approach.",
        (_SBOM, _PUBLISHED, _REPOSITORY), "Which components come from others; whose key signed each model.",
        "Agreements with suppliers.",
    ),
)  # fmt: skip

NOT_COVERED = (
    "Policies, roles, training of people, risk tolerance and management reviews: software has no evidence of these.",
    "The effect on people and society, fairness between groups of people, legal and ethical assessment.",
    "Whether the purpose is right, and what is done with results once they leave the collector.",
    "How models were trained, beyond what their author wrote in the cards.",
    "Known vulnerabilities of the software that is listed.",
    "Environmental cost of training and operation.",
)


class PointSupport(msgspec.Struct, frozen=True):
    """A point with the files that are here for it; with none it is not supported by this folder."""

    framework: str
    part: FrameworkPart
    id: str
    asks: str
    here: list[str]
    not_here: list[str]
    shows: str
    not_shown: str


def evaluate_support(paths: Collection[str], empty_paths: Collection[str] = ()) -> list[PointSupport]:
    """`paths`: what the folder holds; `empty`: those of them that say nothing, such as a list of no incidents watched.

    Files are named by path; folders with their slash.
    """
    found = []
    for point in POINTS:
        here = [name for name in point.files if name not in empty_paths and _is_present(name, paths)]
        missing = [name for name in point.files if name not in here]
        found.append(
            PointSupport(point.framework, point.part, point.id, point.asks, here, missing, point.shows, point.not_shown)
        )
    return found


def _is_present(name: str, paths: Collection[str]) -> bool:
    if name in ("index.html", "manifest.json"):
        return True
    if name.endswith("/"):
        return any(path.startswith(name) for path in paths)
    return name in paths or any(path.startswith("bundles/") and path.endswith(f"/{name}") for path in paths)
