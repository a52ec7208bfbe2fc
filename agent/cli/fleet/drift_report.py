"""What `outstation fleet drift` says: as a document, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from agent import clock
from agent.drift.reporting import parsed_message

if TYPE_CHECKING:
    from agent.drift.baseline.reference import Reference
    from agent.fleet.drift.fleet_wide import Wide
    from agent.fleet.drift.onset import Episode
    from agent.fleet.drift.survey import Group, Survey


def document(found: Survey, device: str | None, references: Mapping[str, Reference]) -> dict[str, Any]:
    """`unreadable`, `repeated`: windows that were left out. Of one device, where it is named, beside its fleet.

    `references`: by digest, those that are known here.
    """
    return {
        "repeated": found.repeated,
        "unreadable": found.unreadable,
        "tasks": [_group(group, device, references.get(group.shipped)) for group in found.groups],
    }


def _group(group: Group, device: str | None, reference: Reference | None) -> dict[str, Any]:
    usual_sd = dict(zip(reference.fields, reference.sd.tolist(), strict=True)) if reference else {}
    stand_out = [one for one in group.standing_out(usual_sd) if device in (None, one.device)]
    moved = [one for one in group.moved() if device in (None, one.device)]
    first = next((e for e in moved if e.ended is None), None)
    episode = [_episode(e) for e in moved]
    estimate = group.estimate()
    return {
        "task": group.task,
        "reference": group.shipped,
        "apart": group.apart is not None,
        "differs": group.apart,
        "windows": group.windows,
        "faulty": group.faulty,
        "undated": group.undated,
        "devices": [
            {
                "device": name,
                "state": one.last.state if one.last else None,
                "windows": one.windows,
                "faulty": one.faulty,
                "drifts": one.episodes.count,
                "last": clock.rfc3339(one.last.t[1]) if one.last else None,
                "accuracy": round(one.accuracy / one.estimates, 4) if one.estimates else None,
            }
            for name, one in group.devices.items()
            if device in (None, name)
        ],
        "features": features(group, device),
        "now": _now(group, device, reference),
        "accuracy": None if estimate is None else round(estimate, 4),
        "wide": [_wide(one) for one in group.wide()],
        "first": _episode(first) if first else None,
        "moved": episode,
        "stand_out": [
            {
                "device": s.device, "field": s.field, "statistic": s.statistic, "z": s.z,
                "value": s.value, "usual": s.usual, **s.sizes,
            }
            for s in stand_out
        ],
        "history": [
            {
                "from": clock.rfc3339(begin), "to": clock.rfc3339(end), "windows": span.windows,
                "drift": sorted(span.drift), "fault": sorted(span.fault),
                "accuracy": round(span.accuracy / span.estimates, 4) if span.estimates else None,
            }
            for begin, end, span in group.history
        ],
    }  # fmt: skip


def features(group: Group, device: str | None) -> dict[str, Any]:
    parts = group.merged() if device is None else group.devices[device].fields
    found = {}
    for name, part in parts.items():
        states = {d: one.last.fields[name].state for d, one in group.devices.items() if one.last}
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


def _now(group: Group, device: str | None, reference: Reference | None) -> dict[str, Any]:
    """The last few windows against the shipped reference, or where that is not known against all windows before."""
    recent = group.now() if device is None else group.devices[device].now()
    whole = group.merged() if device is None else group.devices[device].fields
    found = {}
    for name, part in recent.items():
        sizes = parsed_message.from_reference(reference, name, part.counts) if reference else None
        against = "reference" if sizes else "windows before"
        if sizes is None:
            before = whole[name].without(part)
            sizes = parsed_message.apart(before, part.counts) if before.any() else {}
        found[name] = {
            "n": part.moments.n,
            "mean": part.moments.mean,
            "sd": part.moments.sd,
            "against": against,
            **sizes,
        }
    return found


def _wide(one: Wide) -> dict[str, Any]:
    return {
        "field": one.subject,
        "devices": list(one.devices),
        "of": one.of,
        "usually": None if one.usually is None else round(one.usually, 2),
        "since": clock.rfc3339(one.since),
        "until": clock.rfc3339(one.until),
        "within_s": one.span_us / 1e6,
        "chance": float(f"{one.chance:.2g}"),
        "summary": one.sentence,
    }


def _episode(episode: Episode) -> dict[str, Any]:
    return {
        "device": episode.device,
        "field": episode.subject,
        "test": episode.test,
        "began": clock.rfc3339(episode.began),
        "alarmed": clock.rfc3339(episode.alarmed),
        "ended": None if episode.ended is None else clock.rfc3339(episode.ended),
    }


def lines(document: dict[str, Any]) -> Iterable[str]:
    """For a person."""
    if not document["tasks"]:
        yield "No drift window was collected: a device sends one after every 20 model windows or so."
    for group in document["tasks"]:
        yield from _group_lines(group)
    if document["unreadable"]:
        why = "could not be read, or are of too many different kinds from one device; left out."
        yield f"{document['unreadable']} windows {why}"
    if "plot" in document:
        yield f"drawn: {document['plot']}"


def _group_lines(group: dict[str, Any]) -> Iterable[str]:
    whose = few([one["device"] for one in group["devices"]])
    apart = {
        "reference": f", apart: {whose}, whose reference is not the one that most devices have",
        "layout": f", apart: {whose} with other fields or bins than most devices under this reference",
    }.get(group["differs"], "")
    faulty = f", {group['faulty']} of them with a sensor fault and kept out" if group["faulty"] else ""
    yield click.style(f"{group['task']} under {group['reference'][:19]}{apart}", bold=True)
    accuracy = f"; expected accuracy {group['accuracy']:.2f}" if group["accuracy"] is not None else ""
    yield f"  {count(len(group['devices']), 'device')}, {count(group['windows'], 'window')}{faulty}{accuracy}"
    for name, one in group["features"].items():
        states = [f"{state} on {few(one[state])}" for state in ("drift", "fault") if one[state]]
        now = _now_words(group["now"].get(name, {}))
        yield f"  {name:12} mean {one['mean']:10.4g}   sd {one['sd']:10.4g}{now}   {'; '.join(states) or 'as usual'}"
    for wide in group["wide"]:
        yield click.style(f"  {wide['summary']}", bold=True)
    if group["first"] is not None:
        e = group["first"]
        what = "" if e["test"] == "other" else f" ({e['test']})"
        when = f"from {_short(e['began'])}, alarm {_short(e['alarmed'])}"
        yield f"  moved first: {e['field']}{what} on {e['device']}, {when}"
    for s in group["stand_out"][:10]:
        yield (
            f"  {s['device']} stands out: {s['statistic']} of {s['field']} {s['value']:.3g}, the fleet's median "
            f"{s['usual']:.3g} (z {s['z']:+.1f}, JS {s['js']:.2f})"
        )
    yield ""


def _now_words(now: dict[str, Any]) -> str:
    """Beside the pooled numbers: how far the last windows are from what is usual."""
    if "js" not in now:
        return ""
    w1 = f", W1 {now['w1']:.2f} sd" if "w1" in now else ""
    return f"   now JS {now['js']:.2f}{w1} from the {now['against']}"


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(time_text: str) -> str:
    return f"{time_text[:10]} {time_text[11:19]}"
