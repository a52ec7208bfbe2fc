"""Table of the kinds of alerts: what each means, what causes it, what to do, and how it clears.

`docs/reference/alerts.md` is generated from it by `python -m scripts.alerts_reference`.
"""

from __future__ import annotations

import re
from functools import cache

from msgspec.structs import replace

from outstation.protocol.alerts.alert import OUTPUT_PREFIX, Alert, AlertKind, MonitoredAlert

_ONE_EVENT = (
    "Never: it reports one event. It stays in `outstation fleet alerts` until the device begins another message log."
)
_LOOK_YOURSELF = "Never: a person has to look. It stays in `outstation fleet alerts`."
_DRIFT_CLEARS = (
    "Once the drift test has been close to the site's reference for three drift windows in a row, and 60 rows."
)
_FAULT_CLEARS = "After three drift windows in a row, and 60 rows, without a fault of this kind."
_RELEARN = "If the change is meant to stay, learn the site's reference anew: `outstation reference relearn`."

FIELD_DRIFT = AlertKind(
    *("Field drift", "drift", "{field}", "{field}/drift/{count}", "warning", "task"),
    "Readings of one field no longer follow the distribution that the device learned at this site. The summary says "
    "how far the mean or the spread moved, or that the distribution has another shape, and since when. Any drift alert "
    "says so if the readings of its window are unlike anything the model was trained on; `training_distance` is about "
    "1 for readings like those of the training.",
    "An offset or a new position of the sensor; gain loss; more or less movement; a slow change of temperature or "
    "season; another operating mode of the machine; an hour of the day that the reference does not cover; "
    "[forged readings](../concepts/adversarial-input.md).",
    "Compare the field's picture (`outstation drift`) with the time in the summary, and look at the sensor first. "
    + _RELEARN,
    _DRIFT_CLEARS + " It also clears when the field turns out to follow from another field that is read wrongly.",
    {
        "mean": "the mean moved (CUSUM)",
        "spread": "the spread moved (CUSUM)",
        "shape": "the distribution has another shape (PSI)",
    },
)
OUTPUT_DRIFT = AlertKind(
    *("Drift of the model's answers", "drift", "output", "output/drift/{count}", "warning", "task"),
    "The model names a class more or less often than it did at this site.",
    "Another use of the machine; a fault that the model reports correctly; a model that no longer fits its input.",
    "Check a few answers by hand, and label them: only labels tell a real change from a wrong model. " + _RELEARN,
    _DRIFT_CLEARS,
    {"share": "the share of one class moved (CUSUM)", "shape": "the shares of all classes moved (PSI)"},
)
FURTHER_OUTPUT_DRIFT = AlertKind(
    *("Drift of a further output", "drift", "output.{output}", "output.{output}/drift/{count}", "warning", "task"),
    "An output beside the main one, `[outputs.NAME]` of the bundle, names a class more or less often than it did at "
    "this site, or its score or its values no longer follow the distribution learned here.",
    OUTPUT_DRIFT.causes,
    OUTPUT_DRIFT.action,
    _DRIFT_CLEARS,
    {
        "share": "the share of one class moved (CUSUM)",
        "accuracy": "the certainty, or the accuracy to expect from it, moved (CUSUM)",
        "mean": "values moved towards one end (CUSUM)",
        "spread": "values spread more or less (CUSUM)",
    },
)
SCORE_DRIFT = AlertKind(
    *("Drift of the model's scores", "drift", "score", "score/drift/{count}", "warning", "task"),
    "The model's certainty, its predicted value or its expected error no longer follows what this site learned.",
    "Readings unlike the training data: a new product, a new environment, a sensor that slowly fails.",
    "Look at open alerts of fields first: they usually explain it. Otherwise label results and compare the accuracy.",
    _DRIFT_CLEARS,
    {
        "mean": "the mean moved (CUSUM)",
        "accuracy": "the accuracy to expect from the certainty moved (CUSUM)",
        "error": "the error to expect from the inputs moved (CUSUM)",
        "shape": "the distribution has another shape (PSI)",
    },
)
JOINT_DRIFT = AlertKind(
    *("Drift of correlations", "drift", "joint", "joint/drift/{count}", "warning", "task"),
    "Fields vary together otherwise than at this site before, although each field by itself looks as usual.",
    "A loose mounting; swapped wires; another way of moving.",
    "Check the mounting and the wiring of the fields that the summary names. " + _RELEARN,
    _DRIFT_CLEARS,
    {"pairs": "correlations of pairs of fields moved (CUSUM)"},
)
RATE_DRIFT = AlertKind(
    *("Drift of the signals' speed", "drift", "rate", "rate/drift/{count}", "warning", "task"),
    "All signals move faster or slower than at this site before, although the rows' times do not show it.",
    "Another sampling rate behind a source that stamps rows itself; a sensor clock that runs fast or slow.",
    "Compare the sampling rate that the sensor is set to with the one that the bundle was trained with. " + _RELEARN,
    _DRIFT_CLEARS,
)
FLEET_DRIFT = AlertKind(
    *("Fleet-wide drift", "drift", "{field}", "collector/fleet-wide/{task}/{field}/{since}", "warning", "collector"),
    "So many devices began to drift in one field at about the same time that no single site explains it.",
    "A season or the weather; a new batch of material; a firmware, gateway or bundle that was rolled out.",
    "Compare the time in the summary with what was changed for all devices. `outstation fleet drift` shows the order.",
    "Once less than half of the share that raised it still drifts.",
)
FLEET_REFERENCE = AlertKind(
    *("Reference unlike the fleet's", "drift", "reference"),
    *("collector/fleet-reference/{device}/{task}/{since}", "warning", "collector"),
    "The reference that a device learned differs from those of the other devices with this task, in the mean or the "
    "spread of a field, by more than they differ among themselves.",
    "A sensor that was wrong from the first row; another sensor or unit; a site unlike the others.",
    "Look at the sensors that the summary names. If they are right: `outstation reference accept`. If not, repair "
    "them, then learn again: `outstation reference relearn`.",
    "Once somebody accepts the reference at the device, or the device or the others learn references that agree.",
)
FIELD_FAULT = AlertKind(
    *("Sensor fault", "fault", "{field}", "{field}/fault/{count}", "critical", "task"),
    "A field is read wrongly: this is no drift, and its windows are kept out of drift tests and learning. Each kind of "
    "fault of a field has its own alert.",
    "See the fault's name in the evidence.",
    "Repair or replace the sensor, its cable, its converter or its configuration.",
    _FAULT_CLEARS,
    {
        "missing": "more values are absent than usual here: sensor or cable fault, or its source stopped",
        "stuck": "one value repeats: sensor or cable fault",
        "saturated": "values are held at one end: range too small, sensor at its end, a level that is held",
        "quantized": "values come in coarser steps: another converter, range or rounding",
        "swapped": "the field reads like another one and that one like it: cables or columns were exchanged",
        "reversed": "the sign is reversed: the sensor was turned round, or its poles exchanged",
        "unit": "values fit another unit: a converter, driver or firmware was changed",
        "out_of_range": "values lie far outside the reference: another unit or sensor, a fault, a state not seen here",
        "spikes": "single values jump: loose contact or interference",
    },
)
RATE_FAULT = AlertKind(
    *("Sampling fault", "fault", "rate", "rate/fault/{count}", "critical", "task"),
    "Rows come at another rate than at this site before, or repeat. No field is tested or learned until it ends.",
    "See the fault's name in the evidence.",
    "Check the sampling rate and the clock of the sensor, and whatever forwards its readings.",
    _FAULT_CLEARS,
    {
        "rate": "the time between rows changed: sampling rate or sensor clock",
        "repeated": "rows repeat the row before: the source sends readings again, or a gateway holds the last one",
    },
)
DECAY = AlertKind(
    *("Accuracy fell", "quality", "decay", "quality/decay/{count}", "warning", "task"),
    "Labels show a higher error than the first 200 labels of this bundle on this device.",
    "Concept drift; a sensor that slowly fails; another use of the machine; another person or rule that labels.",
    "Look for drift alerts of the same time, check some labels, and retrain with the labelled results.",
    "After at least 150 labels whose error agrees with the first labels and lies clearly below that of the alert. "
    "A correction of labels can clear it, too.",
)
BELOW_EVALUATION = AlertKind(
    *("Accuracy below the evaluation", "quality", "evaluation", "quality/evaluation/{count}", "warning", "task"),
    "Labels show a lower accuracy than the bundle's own evaluation promises.",
    "Training data unlike this site; an evaluation with target leakage; labels that follow another rule.",
    "Evaluate the bundle on labelled results of this site, and retrain with them.",
    "After at least 150 labels whose error agrees with the evaluation and lies clearly below that of the alert. "
    "A correction of labels can clear it, too.",
)
OVERCONFIDENT = AlertKind(
    *("Certainty no longer holds", "quality", "certainty", "quality/certainty/{count}", "warning", "task"),
    "The model is wrong more often than its certainty says. This is a sign of concept drift: the same input now means "
    "something else.",
    "Concept drift; an input unlike the calibration data; labels that follow another rule.",
    "Do not rely on scores or on accuracy that is estimated without labels. Retrain and recalibrate the bundle.",
    "After at least 150 labels whose error agrees with the certainty and lies clearly below that of the alert. "
    "A correction of labels can clear it, too.",
)
OWN_LABELS = AlertKind(
    *("Labels repeat the model's answers", "quality", "labels", "quality/labels/{count}", "warning", "task"),
    "More than a fifth of the newest labels have the source `model`, or so few of at least 100 labels disagree with "
    "the model that its own scores make this nearly impossible. Such labels prove nothing, and training on them "
    "repeats mistakes.",
    "A pipeline that sends results back as labels; people who confirm a suggestion without looking; scores that are "
    "too low.",
    "Let people label some results without seeing the answer. Do not train on the model's own answers.",
    "Once at most a tenth of the newest labels are the model's own, and the others disagree as often as its scores let "
    "expect.",
)
BUNDLE_FAILED = AlertKind(
    *("Bundle does not run", "model", "{bundle}", "model", "critical", "task"),
    "The configured bundle cannot run here. The previous one goes on, or the task stops and its readings wait.",
    "A file that was altered or is missing; a signature by an unknown key; golden vectors that this processor does "
    "not reproduce; fields that the stream does not have; too little memory.",
    "The summary gives the reason. `outstation check` and `outstation model check` show more; then publish or "
    "configure a bundle that runs.",
    "Once the task runs with the configured bundle.",
)
QUARANTINED = AlertKind(
    *("Bundle quarantined", "model", "{task}", "quarantine", "critical", "task"),
    "The daemon ended twice in a row while this bundle ran. The previous bundle runs instead.",
    "A model that crashes or hangs the runtime; too little memory; failing hardware.",
    "Run `outstation model check` on the bundle on a spare device. Configure another bundle, or send `rollback` to run "
    "it all the same.",
    "When another bundle is configured or an operator sends `rollback`.",
)
BUNDLE_REJECTED = AlertKind(
    *("Rollout rejected", "model", "{task}", "rollout", "warning", "task"),
    "The device did not take the bundle that a rollout wants it to run. The previous one goes on.",
    "A failed verification, an incompatible device, or golden vectors that this processor does not reproduce.",
    "The summary gives the reason. Publish a bundle that fits, or leave this device out of the rollout.",
    "Once the desired bundle runs, or another one is desired.",
)
ROLLED_BACK = AlertKind(
    *("Rollout rolled back", "model", "{task}", "rollout", "critical", "task"),
    "The device ran the new bundle as a canary, and went back to the previous one.",
    "A crash, missed deadlines, errors, drift of the answers, or worse results than the previous bundle.",
    "The summary and the evidence give the reason and the numbers. Compare both bundles before another rollout.",
    "Once the desired bundle runs, or another one is desired.",
)
DEADLINE_MISSED = AlertKind(
    *("Deadline missed", "model", "deadline", "deadline", "warning", "task"),
    "Batches of a single model window took longer than the task's `deadline` three times in a row. Results come late.",
    "A model that is too large for the device; a busy, hot or throttled processor; a slow card.",
    "Give the task a longer deadline, a smaller or quantized model, or give the device less to do.",
    "With the first batch that is on time, or when the task has no deadline any more.",
)
REFERENCE_DEVIATES = AlertKind(
    *("Reference deviates", "drift", "reference", "reference/drift/{count}", "warning", "task"),
    "The reference that the device learned here differs from the shipped one, from the site's former one or from the "
    "accepted one; or a field moved or changed at once while it was learned. Drift is measured from it all the "
    "same, unless `on_deviation` is `hold`.",
    "A sensor that was wrong from the first row; a site unlike the training data; a slow change that was learned.",
    "Look at the sensors that the summary names. If they are right: `outstation reference accept`. If not, repair "
    "them, then learn again: `outstation reference relearn`.",
    "Once somebody accepts the reference, or the next one that is learned does not deviate.",
)
LEARNING_REFUSED = AlertKind(
    *("Learning refused", "model", "reference", "reference/model/{count}", "info", "task"),
    "The windows gathered here do not make a reference of this site, so drift is not tested yet. Gathering goes on.",
    "A site that changes while it is learned; faults; readings unlike the shipped reference.",
    "The summary gives the reason. Repair what is faulty, then run `outstation reference relearn` in normal operation.",
    "Once the site's reference is learned.",
)
RESULT = AlertKind(
    *("Alert rule", "result", "{rule}", "{rule}/result/{count}", "warning", "task"),
    "The model's answers met a rule of the task's config, `[[tasks.NAME.alerts]]`. The summary is the sentence that "
    "the rule gives; severity is the rule's. The evidence names the result that raised the alert: `row`, `time`, "
    "`label`, `score`, `value`, and with `seq` the signed results message that covers it. An alert that waited for its "
    "drift window may have no `seq`.",
    "What the rule was written for; a faulty sensor or a wrong model, where the rule has no `only_healthy`.",
    "What the summary says. If it is wrong, say what was true: `outstation verdict`. `outstation check` explains the "
    "rule.",
    "As the rule says; `outstation check` explains when. It also clears when the rule is removed or changed.",
)
STORE_FULL = AlertKind(
    *("Store full", "storage", "store", "store/space", "critical", "device"),
    "The store has reached its quota or the disk is full, and nothing can be delivered or used. The daemon evicts the "
    "least important data and declares each eviction in the audit log.",
    "A long outage of the network or the collector; a task that does not run; a quota that is too small.",
    "Restore the connection or the task, or raise `[buffer] max_size`.",
    "Ten minutes after the last eviction, once undelivered data takes less than 35 % of the room.",
)
STORE_DAMAGED = AlertKind(
    *("Store repaired", "storage", "store", "storage/recovery/{boot}/{seq}", "critical", "device"),
    "When the daemon opened the store, it was damaged or older than it should be. The evidence lists what is lost.",
    "A failing card; a power cut on a card that does not flush; a deleted or restored file.",
    "Replace the card if it happens again. The damaged files are in the data folder's `quarantine`.",
    _ONE_EVENT,
)
NEW_LOG_STARTED = AlertKind(
    *("New message log", "storage", "log", "storage/log/{log}", "critical", "device"),
    "The message log could not go on, so the device began a new one and wrote its undelivered messages again there.",
    "A store that was restored from an old copy, or that two devices use; a card that lost commits.",
    "Make sure that no second device runs with a copy of this store and key.",
    _ONE_EVENT,
)
DAMAGED_MESSAGES = AlertKind(
    *("Damaged messages", "storage", "outbox", "storage/outbox/{log}/{seq}", "critical", "device"),
    "Messages in the outbox failed their checksum. They are not sent, but moved to table `quarantined_messages` and "
    "declared as lost.",
    "A failing card.",
    "Replace the card.",
    _ONE_EVENT,
)
TOO_LARGE = AlertKind(
    *("Message too large for the broker", "storage", "outbox", "storage/too-large", "warning", "device"),
    "Messages are above the largest packet that the broker takes. They stay on the device, others go on.",
    "A broker with a low limit (Mosquitto: `max_packet_size`); a higher `[broker] max_message_bytes` than it takes.",
    "Raise the broker's limit: the device then sends them. Lower `[broker] max_message_bytes` so that later ones are "
    "split.",
    "Once none of them waits: the broker took them, or the device evicted and declared them.",
)
DAMAGED_ROWS = AlertKind(
    *("Damaged readings", "storage", "{stream}", "storage/{row}", "critical", "task"),
    "Stored readings failed their checksum. They have no results and are kept in table `quarantined_rows`.",
    "A failing card.",
    "Replace the card.",
    _ONE_EVENT,
)
CURSOR_REPAIRED = AlertKind(
    *("Cursor repaired", "storage", "{stream}", "cursor/{row}", "critical", "task"),
    "The task's cursor was behind its drift state. The task goes on where its drift state ends, and runs no row twice.",
    "A card that lost a commit; a store that was repaired.",
    "Replace the card if it happens again.",
    _ONE_EVENT,
)
CLOCK = AlertKind(
    *("Clock not trustworthy", "clock", "clock", "clock", "warning", "device"),
    "No time service has set the clock for a while, or the clock was set although a time service had synchronized it. "
    "Rows are dated afterwards, once a time service sets the clock.",
    "No way to the time server; a device without a clock battery; somebody who sets the clock by hand.",
    "Check systemd-timesyncd or chrony, and the firewall towards its server.",
    "Once a time service synchronizes the clock.",
)
REFUSED_ON_DEVICE = AlertKind(
    *("Messages refused by the device", "security", "refused", "_device/security/refused", "critical", "device"),
    "The device received commands, desired states or acknowledgements that do not verify. It obeyed none of them.",
    "An attack; a client with too many rights on the broker; an operator whose key the device does not trust.",
    "Check who may publish on the device's topics. `outstation status` counts the refusals by reason.",
    "After an hour without such a message.",
)
WIPE_PENDING = AlertKind(
    *("Device will be erased", "security", "wipe", "_device/security/wipe", "critical", "device"),
    "One operator confirmed a wipe. The device erases itself at the time in the summary, or when a second operator's "
    "key confirms a wipe.",
    "`outstation fleet command DEVICE wipe`; a stolen operator key.",
    "Ask who sent it. If nobody did, send `outstation fleet command DEVICE cancel-wipe`, and revoke the key: "
    "`outstation fleet keys revoke`.",
    "Once the wipe is cancelled, or its key is revoked.",
)
REFUSED_BY_COLLECTOR = AlertKind(
    *("Messages refused by the collector", "security", "refused", "collector/refused/{hour}", "critical", "collector"),
    "More than 20 messages in one device's name were refused within ten minutes. Nothing of them was stored.",
    "An attack; a device whose key was changed without enrolling it again.",
    "Look at the samples in table `refusal_samples`. Enrol the device again, or take its rights on the broker.",
    "After an hour without such a message.",
)
OVER_QUOTA_AT_COLLECTOR = AlertKind(
    *("Messages over quota", "security", "quota", "collector/quota/{hour}", "critical", "collector"),
    "More than 20 messages of a device within ten minutes were over its quota at the collector. They were neither "
    "stored nor acknowledged, and stay on the device, which sends them again. Messages of other devices go on.",
    "A device that floods the fleet; a schedule that publishes too much; a backlog larger than the quota's burst.",
    "Look at what the device sends. Raise `[quota]` in fleet.toml, or revoke the device: "
    "`outstation fleet devices revoke`.",
    "After an hour without such a message.",
)
SIGNED_TWICE = AlertKind(
    *("Two messages with one number", "security", "{log}/{seq}", "collector/{log}/{seq}", "critical", "collector"),
    "A device signed two different messages with the same number of one log. The collector keeps the first one.",
    "A copied key; two devices that run with copies of one store; a store that was restored from an old copy.",
    "Find the second device. If the key was stolen, revoke it: `outstation fleet devices revoke`.",
    _LOOK_YOURSELF,
)
TWO_LOGS = AlertKind(
    *("Two logs of one device", "security", "{log}", "collector/two-logs/{log}", "critical", "collector"),
    "Two message logs of one device live at once: one began without naming the other, or the other went on after its "
    "declared end. Alerts of both logs stay open.",
    "A copied card or key; a device whose whole data folder was deleted.",
    "Find the second device. If there is none, say which log is the device's: `outstation fleet log accept`.",
    "Once only one of the logs lives: the later one named the other, or an operator accepted one.",
)
ROTATION_REFUSED = AlertKind(
    *("Key rotation refused", "security", "{log}/{seq}", "collector/{log}/{seq}", "critical", "collector"),
    "A device announced a new signing key that does not prove itself or belongs to another device. Nothing changed.",
    "A stolen key that somebody rotates; two devices that run with copies of one store.",
    "Revoke the device's keys and enrol it again.",
    _LOOK_YOURSELF,
)
KEY_REVOKED = AlertKind(
    *("Key revoked", "security", "{kid}", "collector/revoked/{kid}", "warning", "collector"),
    "An operator revoked a key. Messages that it signs from now on are refused; stored messages stay valid.",
    "`outstation fleet devices revoke`.",
    "Enrol the device with a new key if it goes on.",
    _LOOK_YOURSELF,
)
REPOSITORY_EXPIRY = AlertKind(
    *("Repository needs an operator", "repository", "expiry", "collector/repository", "warning", "collector"),
    "Metadata or keys of the update repository expire soon, or a draft waits to be published.",
    "Roles whose keys are offline have to be signed by a person now and then.",
    "`outstation fleet repository status` says which command to run.",
    "Once nothing expires soon and no draft waits.",
)

DEVICE_SILENT = AlertKind(
    *("Device silent", "connection", "silent", "collector/silent", "critical", "collector"),
    "Nothing arrived from a device for more than three times the interval that its health messages promise. It had not "
    "said that it stops. Time in which no collector ran does not count. A device that never sent anything is silent 24 "
    "hours after its enrolment, as a warning.",
    "No power; no network; a broker or certificate that refuses it; a daemon that hangs or was killed.",
    "Look at the device: power and network first, then `systemctl status outstation` and `outstation check` there.",
    "Once a message arrives, once the device says that it stopped, or once its key is revoked.",
)
BACKLOG_GROWS = AlertKind(
    *("Backlog grows", "connection", "backlog", "collector/backlog", "warning", "collector"),
    "The messages that wait on a device became more with each of its last health messages. It sends more than its "
    "connection or its quota lets through.",
    "A slow or lossy network; `publish` of a task that sends too much; a quota at the collector that is too small.",
    'Publish less (`publish = "changes"` or `"summary"`), raise `[quota]` in fleet.toml, or mend the network.',
    "Once fewer messages wait than ten health messages before, or less than a hundred.",
)
CLOCK_AT_COLLECTOR = AlertKind(
    *("Device clock wrong", "clock", "clock", "collector/clock", "warning", "collector"),
    "The times in a device's messages contradict the collector's clock: they are ahead of it, or late by the same span "
    "in one message after the other. Where most devices contradict it, the alert is about the collector's own clock.",
    "A clock that was set wrongly; a time server that is wrong; a time zone in a hardware clock.",
    "Compare the time on the device and on the collector (`timedatectl`), and let a time service set both.",
    "Once the times agree with the collector's clock again.",
)
STORAGE_ENDS = AlertKind(
    *("Store fills up", "storage", "hours", "collector/storage", "warning", "collector"),
    "At the present rate a device's store is full within a day: it then evicts undelivered data, or refuses readings. "
    "The alert is critical from six hours on.",
    "A backlog that cannot be sent; a `[buffer] max_size` that is too small for the rate of readings.",
    "Mend the connection, raise `[buffer] max_size`, or keep readings for less time.",
    "Once more than a day and a half is left.",
)
CERTIFICATE_ENDS = AlertKind(
    *("Certificate ends", "security", "certificate", "collector/certificate/{name}", "warning", "collector"),
    "A TLS certificate is valid for less than 30 days. The broker refuses it afterwards. The alert is critical from "
    "7 days on.",
    "Certificates have an end so that a stolen one does not serve for ever.",
    "Of a device: `outstation fleet devices renew DEVICE` while it is connected; afterwards as in the guide about "
    "joining a fleet. Of others: `outstation fleet keys reissue collector`, `operator`, `commander` or `broker-admin`; "
    "of a further collector, delete the file that the summary names and run `outstation fleet keys collector NAME`.",
    "Once a certificate that lasts longer is in use.",
)
OUTLIER_DEVICE = AlertKind(
    *("Device unlike its fleet", "outlier", "{field}", "collector/outlier/{task}/{field}", "warning", "collector"),
    "The mean or the spread of a field on one device is far from that of all other devices with the same bundle: more "
    "than 3.5 robust standard deviations from the median, in two surveys in a row. A deviation that more than a "
    "quarter of the devices share is another kind of site, and raises nothing.",
    "A sensor that was mounted otherwise from the start, which the device's own reference takes for normal; another "
    "use of the machine; a wrong unit or calibration.",
    "`outstation fleet drift --task TASK` compares the devices; look at the sensor of this one.",
    "Once two surveys in a row find the device among the others again.",
)
TARGET_FAILS = AlertKind(
    *("Notifications fail", "notify", "{target}", "collector/notify/{target}", "warning", "collector"),
    "A target of notifications did not accept a message for some time. Messages to it wait and are sent later; what "
    "changes meanwhile is joined.",
    "A wrong address or password; a server that is down; no network.",
    "The summary has the target's answer. `outstation fleet alerts notify test TARGET` sends a message at once.",
    "Once the target accepts a message.",
)
TARGET_FAILS_ON_DEVICE = AlertKind(
    *("Notifications of the device fail", "notify", "{target}", "notify/{target}", "warning", "device"),
    TARGET_FAILS.meaning,
    TARGET_FAILS.causes,
    "The summary has the target's answer. `outstation notify test TARGET` on the device sends a message at once.",
    TARGET_FAILS.clears,
)

KINDS = tuple(value for value in list(globals().values()) if isinstance(value, AlertKind))
_MONITORED = {(kind.alert, kind.subject): kind for kind in (OUTPUT_DRIFT, SCORE_DRIFT, JOINT_DRIFT)}


def find_kind(alert: str, subject: str, identity: str, task: str | None, *, from_collector: bool) -> AlertKind | None:
    """Return the kind that an alert's names fit; None for none. The kind with fewest names in braces fits best."""
    own_id = identity.removeprefix(f"{task}/") if task is not None and not from_collector else identity
    if alert == "quality" and "/" in subject:
        output, _, subject = subject.partition("/")
        own_id = own_id.replace(f"quality/{output}/", "quality/", 1)
    for kind in _by_precision():
        if kind.alert != alert or (kind.source == "collector") != from_collector:
            continue
        if _pattern(kind.subject).fullmatch(subject) and _pattern(kind.id).fullmatch(own_id):
            return kind
    return None


def name_output(alert: Alert, output: str) -> Alert:
    """Return an alert about labels as one about those of a further output; "" is the first output."""
    if not output:
        return alert
    return replace(
        alert,
        subject=f"{output}/{alert.subject}",
        id=alert.id.replace("quality/", f"quality/{output}/", 1),
        summary=f"output {output}: {alert.summary}",
        evidence={"output": output, **alert.evidence},
    )


def _precision(kind: AlertKind) -> tuple[int, int]:
    names = kind.subject + kind.id
    return names.count("{"), -len(names)


@cache
def _by_precision() -> tuple[AlertKind, ...]:
    return tuple(sorted(KINDS, key=_precision))


@cache
def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", text)
    return re.compile("(.+)".join(map(re.escape, parts)), re.DOTALL)


def monitoring_kind(alert: MonitoredAlert, subject: str) -> AlertKind:
    """Return the kind of a drift monitor's alert about a field, or about an output, score or joint statistics."""
    if alert == "fault":
        return FIELD_FAULT
    other = FURTHER_OUTPUT_DRIFT if subject.startswith(OUTPUT_PREFIX) else FIELD_DRIFT
    return _MONITORED.get((alert, subject), other)


def monitored_names(subject: str) -> dict[str, str]:
    """Return the names that a drift monitor's alert about this subject is filled in with."""
    return {"field": subject, "output": subject.removeprefix(OUTPUT_PREFIX)}
