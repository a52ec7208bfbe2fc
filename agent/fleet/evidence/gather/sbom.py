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
from agent.fleet.evidence.format.contents import BundleCard

DISTRIBUTION_NAME = "outstation"
# What people install to use it; tools of its developers are no part of it.
_EXTRAS = frozenset({"fleet", "demo", "images", "parquet", "plot", "tflite"})
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA_MARKER = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_MAX_LICENCE_LENGTH = 120


class Sbom(msgspec.Struct):
    """`unlicensed`: packages that name no licence."""

    document: bytes = b""
    component_count: int = 0
    model_count: int = 0
    unlicensed: list[str] = msgspec.field(default_factory=list)
    licence_counts: dict[str, int] = msgspec.field(default_factory=dict)


def build(fleet: str, as_of: str, cards: Iterable[BundleCard]) -> Sbom:
    """The same bytes for the same packages, fleet, time and models."""
    found = Sbom()
    packages = _find_installed()
    parts = {name: _build_component(name, packages[name], found) for name in sorted(packages)}
    root = parts.pop(DISTRIBUTION_NAME, None) or Component(
        name=DISTRIBUTION_NAME, version=__version__, type=ComponentType.APPLICATION
    )
    root.type = ComponentType.APPLICATION
    bom = Bom(components=parts.values())
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.fromisoformat(as_of)
    models = [_model_component(card) for card in cards]
    bom.components.update(models)
    for name, one in packages.items():
        needed = [
            parts[other]
            for other in sorted(_parse_requirements(one, _EXTRAS if name == DISTRIBUTION_NAME else ()))
            if other in parts
        ]
        bom.register_dependency(root if name == DISTRIBUTION_NAME else parts[name], needed)
    content = "\n".join(
        [fleet, as_of, *sorted(str(part.purl) for part in [root, *parts.values()]), *_model_names(models)]
    )
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"outstation evidence {content}")
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    found.document, found.component_count, found.model_count = text.encode() + b"\n", len(parts) + 1, len(models)
    return found


def _model_names(models: Iterable[Component]) -> list[str]:
    return sorted(f"{one.name} {one.version}" for one in models)


def _find_installed() -> dict[str, Distribution]:
    """The agent and, of what it can need, what is there; by normalized name."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(DISTRIBUTION_NAME, _EXTRAS)]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = step = waiting.pop()
        if step in done:
            continue
        done.add(step)
        with suppress(PackageNotFoundError):
            found[name] = metadata.distribution(name)
            waiting += _parse_requirements(found[name], extras).items()
    return found


def _parse_requirements(distribution: Distribution, extras: Iterable[str]) -> dict[str, frozenset[str]]:
    """Normalized name → extras of it. Markers other than extras are left to what is installed."""
    found: dict[str, frozenset[str]] = {}
    for text in distribution.requires or ():
        requirement, _, marker = text.partition(";")
        wanted = _EXTRA_MARKER.findall(marker)
        match = _REQUIREMENT.match(requirement)
        if match is None or (wanted and not set(wanted) & set(extras)):
            continue
        more = frozenset(part.strip() for part in (match[2] or "").split(",") if part.strip())
        name = normalize_name(match[1])
        found[name] = found.get(name, frozenset()) | more
    return found


def normalize_name(name: str) -> str:
    """As package indices compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _build_component(name: str, distribution: Distribution, sbom: Sbom) -> Component:
    text = _read_licence(distribution)
    if text is None:
        sbom.unlicensed.append(name)
    else:
        sbom.licence_counts[text] = sbom.licence_counts.get(text, 0) + 1
    record = distribution.read_text("RECORD")
    noted = [Property(name="outstation:record:sha-256", value=_sha256(record.encode()))] if record else []
    return Component(
        name=name,
        version=distribution.version,
        bom_ref=f"pkg:pypi/{name}@{distribution.version}",
        purl=PackageURL("pypi", None, name, distribution.version),
        description=_metadata_field(distribution, "Summary")[:300] or None,
        licenses=[_to_licence(text)] if text else [],
        hashes=_archive_hashes(distribution),
        properties=noted,
    )


def _to_licence(text: str) -> License:
    if (known := spdx.fixup_id(text)) is not None:
        return DisjunctiveLicense(id=known)
    return LicenseExpression(text) if spdx.is_expression(text) else DisjunctiveLicense(name=text)


def _read_licence(distribution: Distribution) -> str | None:
    """An SPDX expression where it gives one, else what its classifiers or its free text say, if that is short."""
    if expression := _metadata_field(distribution, "License-Expression"):
        return expression
    head = "License :: OSI Approved :: "
    classifiers = [str(c) for c in distribution.metadata.get_all("Classifier") or ()]
    named = [c.removeprefix(head) for c in classifiers if c.startswith(head)]
    if named:
        return " AND ".join(named) if len(named) == 1 else " / ".join(sorted(named))
    text = _metadata_field(distribution, "License")
    return text if text and len(text) <= _MAX_LICENCE_LENGTH and "\n" not in text else None


def _metadata_field(distribution: Distribution, name: str) -> str:
    """A member of a package's metadata; "" where it has none."""
    found = distribution.metadata.get_all(name)
    return str(found[0]).strip() if found else ""


def _archive_hashes(distribution: Distribution) -> list[HashType]:
    """As the installer noted them (PEP 610)."""
    with suppress(ValueError, AttributeError, TypeError):
        told = json.loads(distribution.read_text("direct_url.json") or "{}").get("archive_info", {}).get("hashes", {})
        if isinstance(told.get("sha256"), str):
            return [HashType(alg=HashAlgorithm.SHA_256, content=told["sha256"])]
    return []


def _model_component(card: BundleCard) -> Component:
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
