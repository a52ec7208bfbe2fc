"""What `outstation fleet drift` says: as a document, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from agent import clock
from agent.drift.reporting import parsed_message

if TYPE_CHECKING:
    from agent.drift.baseline.reference import Reference
    from agent.fleet.drift.fleet_wide import FleetWideDrift
    from agent.fleet.drift.onset import DriftEpisode
    from agent.fleet.drift.survey import DriftGroup, FleetDriftSummary


def build_document(
    survey: FleetDriftSummary, device: str | None, references: Mapping[str, Reference]
) -> dict[str, Any]:
    """`unreadable`, `repeated`: windows that were left out. Of one device, where it is named, beside its fleet.

    `references`: by digest, those that are known here.
    """
    return {
        "repeated": survey.duplicates,
        "unreadable": survey.unreadable,
        "tasks": [_group_document(group, device, references.get(group.shipped_reference)) for group in survey.groups],
    }


def _group_document(group: DriftGroup, device: str | None, reference: Reference | None) -> dict[str, Any]:
    usual_sd = dict(zip(reference.fields, reference.sd.tolist(), strict=True)) if reference else {}
    stand_out = [one for one in group.find_outliers(usual_sd) if device in (None, one.device)]
    moved = [one for one in group.ordered_episodes() if device in (None, one.device)]
    first = next((e for e in moved if e.ended is None), None)
    episode = [_episode_document(e) for e in moved]
    estimate = group.estimate_accuracy()
    return {
        "task": group.task,
        "reference": group.shipped_reference,
        "apart": group.differs_in is not None,
        "differs": group.differs_in,
        "windows": group.windows,
        "faulty": group.faulty,
        "undated": group.undated,
        "devices": [
            {
                "device": name,
                "state": one.last_window.state if one.last_window else None,
                "windows": one.windows,
                "faulty": one.faulty,
                "drifts": one.episodes.total_alarms,
                "last": clock.to_rfc3339(one.last_window.t[1]) if one.last_window else None,
                "accuracy": round(one.accuracy_sum / one.estimate_count, 4) if one.estimate_count else None,
            }
            for name, one in group.devices.items()
            if device in (None, name)
        ],
        "features": build_feature_documents(group, device),
        "now": _recent_documents(group, device, reference),
        "accuracy": None if estimate is None else round(estimate, 4),
        "wide": [_fleet_wide_document(one) for one in group.detect_fleet_wide()],
        "first": _episode_document(first) if first else None,
        "moved": episode,
        "stand_out": [
            {
                "device": s.device, "field": s.field, "statistic": s.statistic, "z": s.z,
                "value": s.value, "usual": s.fleet_median, **s.divergences,
            }
            for s in stand_out
        ],
        "history": [
            {
                "from": clock.to_rfc3339(begin), "to": clock.to_rfc3339(end), "windows": span.windows,
                "drift": sorted(span.drifting_devices), "fault": sorted(span.faulty_devices),
                "accuracy": round(span.accuracy_sum / span.estimate_count, 4) if span.estimate_count else None,
            }
            for begin, end, span in group.history
        ],
    }  # fmt: skip


def build_feature_documents(group: DriftGroup, device: str | None) -> dict[str, Any]:
    parts = group.merge_fields() if device is None else group.devices[device].fields
    found = {}
    for name, part in parts.items():
        states = {d: one.last_window.fields[name].state for d, one in group.devices.items() if one.last_window}
        found[name] = {
            "n": part.moments.n,
            "missing": part.missing,
            "below": int(part.counts[0]),
            "above": int(part.counts[-1]),
            "counts": part.counts[1:-1].tolist(),
            "mean": part.moments.mean,
            "m2": part.moments.m2,
            "sd": part.moments.sd,
            "drift": [d for d, state in states.items() if state == "drift"],
            "fault": [d for d, state in states.items() if state == "fault"],
        }
    return found


def _recent_documents(group: DriftGroup, device: str | None, reference: Reference | None) -> dict[str, Any]:
    """The last few windows against the shipped reference, or where that is not known against all windows before."""
    recent = group.merge_recent() if device is None else group.devices[device].merge_recent()
    whole = group.merge_fields() if device is None else group.devices[device].fields
    found = {}
    for name, part in recent.items():
        sizes = parsed_message.effect_sizes_to_reference(reference, name, part.counts) if reference else None
        against = "reference" if sizes else "windows before"
        if sizes is None:
            before = whole[name].counts_without(part)
            sizes = parsed_message.effect_sizes(before, part.counts) if before.any() else {}
        found[name] = {
            "n": part.moments.n,
            "mean": part.moments.mean,
            "sd": part.moments.sd,
            "against": against,
            **sizes,
        }
    return found


def _fleet_wide_document(drift: FleetWideDrift) -> dict[str, Any]:
    return {
        "field": drift.subject,
        "devices": list(drift.devices),
        "of": drift.device_count,
        "usually": None if drift.usual_count is None else round(drift.usual_count, 2),
        "since": clock.to_rfc3339(drift.since),
        "until": clock.to_rfc3339(drift.until),
        "within_s": drift.span_us / 1e6,
        "chance": float(f"{drift.p_value:.2g}"),
        "summary": drift.summary,
    }


def _episode_document(episode: DriftEpisode) -> dict[str, Any]:
    return {
        "device": episode.device,
        "field": episode.subject,
        "test": episode.test,
        "began": clock.to_rfc3339(episode.began),
        "alarmed": clock.to_rfc3339(episode.alarmed),
        "ended": None if episode.ended is None else clock.to_rfc3339(episode.ended),
    }


def format_lines(document: dict[str, Any]) -> Iterable[str]:
    """For a person."""
    if not document["tasks"]:
        yield "No drift window was collected: a device sends one after every 20 model windows or so."
    for group in document["tasks"]:
        yield from _format_group(group)
    if document["unreadable"]:
        why = "could not be read, or are of too many different kinds from one device; left out."
        yield f"{document['unreadable']} windows {why}"
    if "plot" in document:
        yield f"drawn: {document['plot']}"


def _format_group(group: dict[str, Any]) -> Iterable[str]:
    whose = abbreviate_names([one["device"] for one in group["devices"]])
    apart = {
        "reference": f", apart: {whose}, whose reference is not the one that most devices have",
        "layout": f", apart: {whose} with other fields or bins than most devices under this reference",
    }.get(group["differs"], "")
    faulty = f", {group['faulty']} of them with a sensor fault and kept out" if group["faulty"] else ""
    yield click.style(f"{group['task']} under {group['reference'][:19]}{apart}", bold=True)
    accuracy = f"; expected accuracy {group['accuracy']:.2f}" if group["accuracy"] is not None else ""
    yield f"  {pluralize(len(group['devices']), 'device')}, {pluralize(group['windows'], 'window')}{faulty}{accuracy}"
    for name, one in group["features"].items():
        states = [f"{state} on {abbreviate_names(one[state])}" for state in ("drift", "fault") if one[state]]
        now = _format_recent(group["now"].get(name, {}))
        yield f"  {name:12} mean {one['mean']:10.4g}   sd {one['sd']:10.4g}{now}   {'; '.join(states) or 'as usual'}"
    for wide in group["wide"]:
        yield click.style(f"  {wide['summary']}", bold=True)
    if group["first"] is not None:
        e = group["first"]
        what = "" if e["test"] == "other" else f" ({e['test']})"
        when = f"from {_format_short_time(e['began'])}, alarm {_format_short_time(e['alarmed'])}"
        yield f"  moved first: {e['field']}{what} on {e['device']}, {when}"
    for s in group["stand_out"][:10]:
        yield (
            f"  {s['device']} stands out: {s['statistic']} of {s['field']} {s['value']:.3g}, the fleet's median "
            f"{s['usual']:.3g} (z {s['z']:+.1f}, JS {s['js']:.2f})"
        )
    yield ""


def _format_recent(now: dict[str, Any]) -> str:
    """Beside the pooled numbers: how far the last windows are from what is usual."""
    if "js" not in now:
        return ""
    w1 = f", W1 {now['w1']:.2f} sd" if "w1" in now else ""
    return f"   now JS {now['js']:.2f}{w1} from the {now['against']}"


def pluralize(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def abbreviate_names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _format_short_time(time_text: str) -> str:
    return f"{time_text[:10]} {time_text[11:19]}"
