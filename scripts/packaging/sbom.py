"""Bill of materials (CycloneDX 1.6) of a site-packages folder, for the machine that installs it."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion

from outstation.evidence.gather.sbom import Sbom, build_component, normalize_name, read_licence


def list_distributions(site: Path) -> list[Distribution]:
    """Return what is installed in a site-packages folder of any architecture, by name."""
    return [PathDistribution(info) for info in sorted(site.glob("*.dist-info"))]


def describe_site(site: Path, name: str, version: str, epoch: int) -> bytes:
    """Return the bill of materials of package `name`. Equal packages and times give equal bytes."""
    components = [
        build_component(normalize_name(distribution.name), distribution, Sbom())
        for distribution in list_distributions(site)
    ]
    bom = Bom(components=components)
    bom.metadata.component = Component(
        name=name, version=version, type=ComponentType.APPLICATION, bom_ref=f"pkg:deb/{name}@{version}"
    )
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, UTC)
    bom.register_dependency(bom.metadata.component, components)
    purls = "\n".join(sorted(str(component.purl) for component in components))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {version} {epoch}\n{purls}")
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    return text.encode() + b"\n"


def describe_licences(site: Path) -> str:
    """Return a line for each library in `site`: name, version, licence, and where its text is."""
    lines = []
    for distribution in list_distributions(site):
        licence = read_licence(distribution) or "see its folder"
        lines.append(f" {distribution.name} {distribution.version}: {licence}")
    return "\n".join(lines) + "\n"
