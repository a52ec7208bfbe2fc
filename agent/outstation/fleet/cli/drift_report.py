"""Report of `outstation fleet drift`: the JSON document, and lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from outstation.foundation import clock
from outstation.foundation.text import list_names, pluralize
from outstation.ml.drift.reporting import parsed_message
from outstation.protocol.alerts.alert import OUTPUT_PREFIX

if TYPE_CHECKING:
    from outstation.fleet.drift.fleet_wide import FleetWideDrift
    from outstation.fleet.drift.merge import PerformanceEstimates
    from outstation.fleet.drift.survey import DriftGroup, FleetDriftSummary
    from outstation.ml.drift.baseline.reference import Reference

_MAX_OUTLIERS = 10


def build_document(
    survey: FleetDriftSummary, device: FleetDriftSummary | None, references: Mapping[str, Reference]
) -> dict[str, Any]:
    """Return the document for the fleet, or for one `device` with outliers and fleet-wide drift of its fleet.

    `references`: the shipped references known on this machine, by digest.
    """
    own = survey if device is None else device
    groups = {group.key: group for group in survey.groups}
    pairs = [(groups[group.key], group) for group in own.groups if group.key in groups]
    return {
        "duplicate_windows": own.duplicates,
        "unreadable_windows": own.unreadable,
        "tasks": [_group_document(*pair, references.get(pair[0].shipped_reference)) for pair in pairs],
    }


def _group_document(fleet: DriftGroup, own: DriftGroup, reference: Reference | None) -> dict[str, Any]:
    """Describe the windows in `own`, all of a group's or those of one of its devices."""
    reference_sd = dict(zip(reference.fields, reference.sd.tolist(), strict=True)) if reference else {}
    outliers = [outlier for outlier in fleet.find_outliers(reference_sd) if outlier.device in own.devices]
    fleet_wide = [drift for drift in fleet.detect_fleet_wide() if not own.devices.keys().isdisjoint(drift.devices)]
    episodes, expected = own.ordered_episodes(), own.estimate_performance()
    first = next((episode for episode in episodes if episode.ended is None), None)
    return {
        "task": fleet.task,
        "reference": fleet.shipped_reference,
        "differs_in": fleet.differs_in,
        "windows": own.windows,
        "sensor_fault_windows": own.faulty,
        "unsynced_windows": own.undated,
        "devices": [
            {
                "device": name,
                "state": drift.last_window.state if drift.last_window else None,
                "windows": drift.windows,
                "sensor_fault_windows": drift.faulty,
                "alarms": drift.episodes.total_alarms,
                "last": clock.to_rfc3339(drift.last_window.t[1]) if drift.last_window else None,
                **_expected_members(drift.expected),
            }
            for name, drift in own.devices.items()
        ],
        "features": build_feature_documents(own),
        "outputs": _output_documents(own),
        "outputs_omitted": own.list_outputs()[1],
        "recent": _recent_documents(own, reference),
        **_expected_members(expected),
        "expected_outputs": {name: _expected_members(each) for name, each in sorted(expected.further.items())},
        "fleet_wide": [_fleet_wide_document(drift) for drift in fleet_wide],
        "first_onset": first.to_document() if first else None,
        "onsets": [episode.to_document() for episode in episodes],
        "outliers": [
            {
                "device": outlier.device, "field": outlier.field, "statistic": outlier.statistic, "z": outlier.z,
                "value": outlier.value, "fleet_median": outlier.fleet_median, **outlier.divergences,
            }
            for outlier in outliers
        ],
        "history": [
            {
                "from": clock.to_rfc3339(begin), "to": clock.to_rfc3339(end), "windows": span.windows,
                "drift": sorted(span.drifting_devices), "fault": sorted(span.faulty_devices),
                **_expected_members(span.expected),
            }
            for begin, end, span in own.history
        ],
    }  # fmt: skip


def _format_expected(estimates: dict[str, Any]) -> str:
    accuracy, error = estimates["accuracy"], estimates["mae"]
    text = f"; expected accuracy {accuracy:.2f}" if accuracy is not None else ""
    return f"{text}; expected error {error:.4g}" if error is not None else text


def _expected_members(expected: PerformanceEstimates) -> dict[str, float | None]:
    return {"accuracy": _round(expected.accuracy), "mae": _round(expected.error)}


def build_feature_documents(group: DriftGroup) -> dict[str, Any]:
    """Return the merged summary of each field, and the devices where it drifts or has a fault."""
    documents = {}
    for name, part in group.merge_fields().items():
        states = {
            each: drift.last_window.fields[name].state for each, drift in group.devices.items() if drift.last_window
        }
        documents[name] = {
            "n": part.moments.n,
            "missing": part.missing,
            "below": int(part.counts[0]),
            "above": int(part.counts[-1]),
            "counts": part.counts[1:-1].tolist(),
            "mean": part.moments.mean,
            "m2": part.moments.m2,
            "sd": part.sd,
            "drift": [each for each, state in states.items() if state == "drift"],
            "fault": [each for each, state in states.items() if state == "fault"],
        }
    return documents


def _output_documents(group: DriftGroup) -> dict[str, dict[str, list[str]]]:
    """Return the devices whose newest window has each state of a further output: name → state → devices."""
    documents: dict[str, dict[str, list[str]]] = {}
    outputs = group.list_outputs()[0]
    for name, drift in group.devices.items():
        if drift.last_window is None:
            continue
        for subject, report in drift.last_window.subjects.items():
            output = subject.removeprefix(OUTPUT_PREFIX)
            if output != subject and output in outputs:
                states = documents.setdefault(output, {})
                states.setdefault(report.state, []).append(name)
    return documents


def _recent_documents(group: DriftGroup, reference: Reference | None) -> dict[str, Any]:
    """Compare the last few windows with the shipped reference, or if it is not known with all earlier windows."""
    recent, merged = group.merge_recent(), group.merge_fields()
    documents = {}
    for name, part in recent.items():
        sizes = parsed_message.effect_sizes_to_reference(reference, name, part.counts) if reference else None
        against = "reference" if sizes else "earlier windows"
        if sizes is None:
            before = merged[name].counts_without(part)
            sizes = parsed_message.effect_sizes(before, part.counts) if before.any() else {}
        documents[name] = {
            "n": part.moments.n,
            "mean": part.moments.mean,
            "sd": part.sd,
            "against": against,
            **sizes,
        }
    return documents


def _fleet_wide_document(drift: FleetWideDrift) -> dict[str, Any]:
    return {
        "field": drift.subject,
        "devices": list(drift.devices),
        "reporting_devices": drift.device_count,
        "usual_devices": None if drift.usual_count is None else round(drift.usual_count, 2),
        "since": clock.to_rfc3339(drift.since),
        "until": clock.to_rfc3339(drift.until),
        "span_s": drift.span_us / 1e6,
        "p_value": float(f"{drift.p_value:.2g}"),
        "summary": drift.summary,
    }


def format_lines(document: dict[str, Any]) -> Iterable[str]:
    """Yield the report in lines for a person; headings are bold."""
    if not document["tasks"]:
        yield "No drift window was collected for this task, device and time: a device sends one after 20 model windows."
    for group in document["tasks"]:
        yield from _format_group(group)
    if document["unreadable_windows"]:
        reason = "are unreadable, or exceed the references and layouts of one device, and were left out"
        yield f"{document['unreadable_windows']} windows {reason}."
    if "plot" in document:
        yield f"drawn: {document['plot']}"


def _format_group(group: dict[str, Any]) -> Iterable[str]:
    names = list_names([device["device"] for device in group["devices"]], 4)
    difference = {
        "reference": f": {names}, with another reference than most devices",
        "layout": f": {names}, with other fields or bins than most devices with this reference",
    }.get(group["differs_in"], "")
    faults = group["sensor_fault_windows"]
    faulty = f", {faults} of them left out for a sensor fault" if faults else ""
    yield click.style(f"{group['task']} under {group['reference'][:19]}{difference}", bold=True)
    expected = _format_expected(group)
    expected += "".join(f"; {name}{_format_expected(each)[1:]}" for name, each in group["expected_outputs"].items())
    yield f"  {pluralize(len(group['devices']), 'device')}, {pluralize(group['windows'], 'window')}{faulty}{expected}"
    if recent := {each["against"] for each in group["recent"].values() if "js" in each}:
        yield f"  JS and W1 compare the newest windows with the {' or the '.join(sorted(recent))}"
    for name, field in group["features"].items():
        states = [f"{state} on {list_names(field[state], 4)}" for state in ("drift", "fault") if field[state]]
        change, size = group["recent"].get(name, {}), ""
        if "js" in change:
            w1 = f", W1 {change['w1']:.2f} sd" if "w1" in change else ""
            size = f"  JS {change['js']:.2f}{w1}"
        state = "; ".join(states) or "ok"
        yield f"  {name:12} mean {field['mean']:9.3g}  sd {field['sd']:9.3g}{size}  {state}"
    for name, states in group["outputs"].items():
        listed = [f"{state} on {list_names(devices, 4)}" for state, devices in states.items() if state != "ok"]
        yield f"  output {name}: {'; '.join(listed) or 'ok'}"
    if group["outputs_omitted"]:
        yield f"  {pluralize(group['outputs_omitted'], 'report')} of more outputs than a model may have, left out"
    for drift in group["fleet_wide"]:
        yield click.style(f"  {drift['summary']}", bold=True)
    if group["first_onset"] is not None:
        onset = group["first_onset"]
        test = "" if onset["test"] == "other" else f" ({onset['test']})"
        times = f"since {_format_short_time(onset['started'])}, alarm {_format_short_time(onset['alarmed'])}"
        yield f"  first onset: {onset['field']}{test} on {onset['device']}, {times}"
    for outlier in group["outliers"][:_MAX_OUTLIERS]:
        yield (
            f"  outlier {outlier['device']}: {outlier['statistic']} of {outlier['field']} {outlier['value']:.3g}, "
            f"fleet median {outlier['fleet_median']:.3g} (z {outlier['z']:+.1f}, JS {outlier['js']:.2f})"
        )
    yield ""


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _format_short_time(time_text: str) -> str:
    return f"{time_text[:10]} {time_text[11:19]}"
