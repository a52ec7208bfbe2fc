"""Software bill of materials (CycloneDX 1.6): the agent installed here, its dependencies, and the fleet's models.

Licences are those that packages declare. A package carries the SHA-256 of its archive, if the installer recorded it,
and the SHA-256 of its RECORD, which lists the SHA-256 of each installed file.
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

from outstation import __version__
from outstation.evidence.format.contents import BundleCard

DISTRIBUTION_NAME = "outstation"
# Extras for users; development tools are not part of the product.
_EXTRAS = frozenset({"fleet", "demo", "images", "parquet", "plot", "tflite"})
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA_MARKER = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_MAX_LICENCE_LENGTH = 120


class Sbom(msgspec.Struct):
    """Bill of materials. `unlicensed` lists packages that declare no licence."""

    document: bytes = b""
    component_count: int = 0
    model_count: int = 0
    unlicensed: list[str] = msgspec.field(default_factory=list)
    licence_counts: dict[str, int] = msgspec.field(default_factory=dict)


def build(fleet: str, as_of: str, cards: Iterable[BundleCard]) -> Sbom:
    """Return the bill of materials. Equal packages, fleet, time and models give equal bytes."""
    sbom = Sbom()
    packages = _find_installed()
    components = {name: build_component(name, packages[name], sbom) for name in sorted(packages)}
    root = components.pop(DISTRIBUTION_NAME, None) or Component(
        name=DISTRIBUTION_NAME, version=__version__, type=ComponentType.APPLICATION
    )
    root.type = ComponentType.APPLICATION
    bom = Bom(components=components.values())
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.fromisoformat(as_of)
    models = [_model_component(card) for card in cards]
    bom.components.update(models)
    for name, distribution in packages.items():
        extras = _EXTRAS if name == DISTRIBUTION_NAME else ()
        requirements = sorted(_parse_requirements(distribution, extras))
        needed = [components[other] for other in requirements if other in components]
        bom.register_dependency(root if name == DISTRIBUTION_NAME else components[name], needed)
    purls = sorted(str(component.purl) for component in [root, *components.values()])
    content = "\n".join([fleet, as_of, *purls, *sorted(f"{model.name} {model.version}" for model in models)])
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"outstation evidence {content}")
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    sbom.document, sbom.component_count, sbom.model_count = text.encode() + b"\n", len(components) + 1, len(models)
    return sbom


def _find_installed() -> dict[str, Distribution]:
    """Return the agent and its installed dependencies, transitively, by normalized name."""
    installed: dict[str, Distribution] = {}
    queue: list[tuple[str, frozenset[str]]] = [(DISTRIBUTION_NAME, _EXTRAS)]
    done: set[tuple[str, frozenset[str]]] = set()
    while queue:
        name, extras = step = queue.pop()
        if step in done:
            continue
        done.add(step)
        with suppress(PackageNotFoundError):
            installed[name] = metadata.distribution(name)
            queue += _parse_requirements(installed[name], extras).items()
    return installed


def _parse_requirements(distribution: Distribution, extras: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return normalized name → required extras. Markers other than `extra` are ignored; only installed ones count."""
    requirements: dict[str, frozenset[str]] = {}
    for text in distribution.requires or ():
        requirement, _, marker = text.partition(";")
        marker_extras = _EXTRA_MARKER.findall(marker)
        match = _REQUIREMENT.match(requirement)
        if match is None or (marker_extras and not set(marker_extras) & set(extras)):
            continue
        more = frozenset(part.strip() for part in (match[2] or "").split(",") if part.strip())
        name = normalize_name(match[1])
        requirements[name] = requirements.get(name, frozenset()) | more
    return requirements


def normalize_name(name: str) -> str:
    """Return the normalized package name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build_component(name: str, distribution: Distribution, sbom: Sbom) -> Component:
    """Return the component of a package, and count its licence in `sbom`."""
    text = read_licence(distribution)
    if text is None:
        sbom.unlicensed.append(name)
    else:
        sbom.licence_counts[text] = sbom.licence_counts.get(text, 0) + 1
    record = distribution.read_text("RECORD")
    checksum = hashlib.sha256((record or "").encode()).hexdigest()
    properties = [Property(name="outstation:record:sha-256", value=checksum)] if record else []
    return Component(
        name=name,
        version=distribution.version,
        bom_ref=f"pkg:pypi/{name}@{distribution.version}",
        purl=PackageURL("pypi", None, name, distribution.version),
        description=_metadata_field(distribution, "Summary")[:300] or None,
        licenses=[_to_licence(text)] if text else [],
        hashes=_archive_hashes(distribution),
        properties=properties,
    )


def _to_licence(text: str) -> License:
    if (known := spdx.fixup_id(text)) is not None:
        return DisjunctiveLicense(id=known)
    return LicenseExpression(text) if spdx.is_expression(text) else DisjunctiveLicense(name=text)


def read_licence(distribution: Distribution) -> str | None:
    """Return the SPDX expression of a package, else the licence in its classifiers, else its free text if short."""
    if expression := _metadata_field(distribution, "License-Expression"):
        return expression
    head = "License :: OSI Approved :: "
    classifiers = [str(classifier) for classifier in distribution.metadata.get_all("Classifier") or ()]
    licences = sorted(classifier.removeprefix(head) for classifier in classifiers if classifier.startswith(head))
    if licences:
        return " / ".join(licences)
    text = _metadata_field(distribution, "License")
    return text if text and len(text) <= _MAX_LICENCE_LENGTH and "\n" not in text else None


def _metadata_field(distribution: Distribution, name: str) -> str:
    """Return a field of a package's metadata, "" if it is absent."""
    values = distribution.metadata.get_all(name)
    return str(values[0]).strip() if values else ""


def _archive_hashes(distribution: Distribution) -> list[HashType]:
    """Return the hash of the archive that the installer recorded (PEP 610)."""
    with suppress(ValueError, AttributeError, TypeError):
        hashes = json.loads(distribution.read_text("direct_url.json") or "{}").get("archive_info", {}).get("hashes", {})
        if isinstance(hashes.get("sha256"), str):
            return [HashType(alg=HashAlgorithm.SHA_256, content=hashes["sha256"])]
    return []


def _model_component(card: BundleCard) -> Component:
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=card.name,
        version=card.version,
        bom_ref=f"bundle:{card.digest}",
        description=card.summary[:300] or None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=card.model_sha256)],
        properties=[Property(name="outstation:bundle:digest", value=card.digest)],
    )
