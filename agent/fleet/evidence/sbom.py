"""sbom.cdx.json: the agent that is installed here and what it depends on, in CycloneDX 1.6, with the models beside it.

Licences are what packages say of themselves. A package has the SHA-256 of the archive it was installed from where the
installer noted it; and of its RECORD, in which the SHA-256 of each installed file stands.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from importlib.metadata import Distribution, PackageNotFoundError

import msgspec
from cyclonedx import spdx
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, License, LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from agent import __version__
from agent.fleet.evidence.contents import Card

AGENT = "outstation"
# What people install to use it; tools of its developers are no part of it.
_EXTRAS = frozenset({"fleet", "demo", "images", "parquet", "plot", "tflite"})
_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_LONGEST_LICENCE = 120


class Found(msgspec.Struct):
    """`unlicensed`: packages that name no licence."""

    document: bytes = b""
    components: int = 0
    models: int = 0
    unlicensed: list[str] = msgspec.field(default_factory=list)
    licences: dict[str, int] = msgspec.field(default_factory=dict)


def bill(fleet: str, at: str, cards: Iterable[Card]) -> Found:
    """The same bytes for the same packages, fleet, time and models."""
    found = Found()
    packages = _installed()
    parts = {name: _component(name, packages[name], found) for name in sorted(packages)}
    root = parts.pop(AGENT, None) or Component(name=AGENT, version=__version__, type=ComponentType.APPLICATION)
    root.type = ComponentType.APPLICATION
    bom = Bom(components=parts.values())
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.fromisoformat(at)
    models = [_model(card) for card in cards]
    bom.components.update(models)
    for name, one in packages.items():
        needed = [parts[other] for other in sorted(_needs(one, _EXTRAS if name == AGENT else ())) if other in parts]
        bom.register_dependency(root if name == AGENT else parts[name], needed)
    content = "\n".join([fleet, at, *sorted(str(part.purl) for part in [root, *parts.values()]), *_names(models)])
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"outstation evidence {content}")
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    found.document, found.components, found.models = text.encode() + b"\n", len(parts) + 1, len(models)
    return found


def _names(models: Iterable[Component]) -> list[str]:
    return sorted(f"{one.name} {one.version}" for one in models)


def _installed() -> dict[str, Distribution]:
    """The agent and, of what it can need, what is there; by normalized name."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(AGENT, _EXTRAS)]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = step = waiting.pop()
        if step in done:
            continue
        done.add(step)
        with suppress(PackageNotFoundError):
            found[name] = metadata.distribution(name)
            waiting += _needs(found[name], extras).items()
    return found


def _needs(one: Distribution, extras: Iterable[str]) -> dict[str, frozenset[str]]:
    """Normalized name → extras of it. Markers other than extras are left to what is installed."""
    found: dict[str, frozenset[str]] = {}
    for text in one.requires or ():
        requirement, _, marker = text.partition(";")
        wanted = _EXTRA.findall(marker)
        match = _NAME.match(requirement)
        if match is None or (wanted and not set(wanted) & set(extras)):
            continue
        more = frozenset(part.strip() for part in (match[2] or "").split(",") if part.strip())
        name = normalized(match[1])
        found[name] = found.get(name, frozenset()) | more
    return found


def normalized(name: str) -> str:
    """As package indices compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _component(name: str, one: Distribution, found: Found) -> Component:
    text = _licence(one)
    if text is None:
        found.unlicensed.append(name)
    else:
        found.licences[text] = found.licences.get(text, 0) + 1
    record = one.read_text("RECORD")
    noted = [Property(name="outstation:record:sha-256", value=_sha256(record.encode()))] if record else []
    return Component(
        name=name,
        version=one.version,
        bom_ref=f"pkg:pypi/{name}@{one.version}",
        purl=PackageURL("pypi", None, name, one.version),
        description=_told(one, "Summary")[:300] or None,
        licenses=[_as_licence(text)] if text else [],
        hashes=_archive_hashes(one),
        properties=noted,
    )


def _as_licence(text: str) -> License:
    if (known := spdx.fixup_id(text)) is not None:
        return DisjunctiveLicense(id=known)
    return LicenseExpression(text) if spdx.is_expression(text) else DisjunctiveLicense(name=text)


def _licence(one: Distribution) -> str | None:
    """An SPDX expression where it gives one, else what its classifiers or its free text say, if that is short."""
    if expression := _told(one, "License-Expression"):
        return expression
    head = "License :: OSI Approved :: "
    classifiers = [str(c) for c in one.metadata.get_all("Classifier") or ()]
    named = [c.removeprefix(head) for c in classifiers if c.startswith(head)]
    if named:
        return " AND ".join(named) if len(named) == 1 else " / ".join(sorted(named))
    text = _told(one, "License")
    return text if text and len(text) <= _LONGEST_LICENCE and "\n" not in text else None


def _told(one: Distribution, name: str) -> str:
    """A member of a package's metadata; "" where it has none."""
    found = one.metadata.get_all(name)
    return str(found[0]).strip() if found else ""


def _archive_hashes(one: Distribution) -> list[HashType]:
    """As the installer noted them (PEP 610)."""
    with suppress(ValueError, AttributeError, TypeError):
        told = json.loads(one.read_text("direct_url.json") or "{}").get("archive_info", {}).get("hashes", {})
        if isinstance(told.get("sha256"), str):
            return [HashType(alg=HashAlgorithm.SHA_256, content=told["sha256"])]
    return []


def _model(card: Card) -> Component:
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=card.name,
        version=card.version,
        bom_ref=f"bundle:{card.digest}",
        description=card.about[:300] or None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=card.model_sha256)],
        properties=[Property(name="outstation:bundle:digest", value=card.digest)],
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
