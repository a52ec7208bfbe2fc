"""Task keys: names under which the store keeps the state of each task, in table `task_state`."""

from __future__ import annotations

# Schedule: wall time of the last run (epoch µs), and what operators changed.
LAST_RUN = "last run"
PAUSED = "paused"
SCHEDULE_OVERRIDE = "schedule override"
LATE_BATCH = "late batch"

# Bundles: history, override, quarantine by digest, crashes of the active one, and the alert of one that does not load.
BUNDLE_HISTORY = "bundle history"
BUNDLE_OVERRIDE = "bundle override"
QUARANTINED_BUNDLES = "quarantined bundles"
CRASH_COUNT = "crash count"
BUNDLE_ALERT = "bundle alert"
TUNINGS = "tunings"

# Drift detection; `SAVED_SUFFIX` marks what is put away while another bundle runs as a canary. `ENDED_DRIFT`: what the
# next bundle with a reference continues, after one without.
DRIFT_STATE = "drift state"
LEARNING = "learning"
SITE_REFERENCE = "site reference"
SHIPPED_REFERENCE = "shipped reference"
REFERENCE_GUARD = "reference guard"
LEARNING_REFUSED_ALERT = "learning refused alert"
RELEARN_REQUEST = "relearn request"
RELEARN_REQUEST_DONE = "relearn request done"
ENDED_DRIFT = "ended drift"
SAVED_SUFFIX = " before canary"

# First rows of joined streams that the task still needs, and since when its windows wait for them.
JOINED_ROWS = "joined rows"
JOINED_WAIT = "joined wait"

# Labels: windows that gather, the last `quality` message, and the labels behind each of its numbers.
LABEL_METRICS = "label metrics"
LAST_LABEL_METRICS = "last label metrics"
PUBLISHED_CELLS = "published cells"

# Rollouts: state, bundles on hold, progress of the canary, and the shadow evaluation.
ROLLOUT_STATE = "rollout state"
HOLD_OFFS = "hold-offs"
CANARY_PROGRESS = "canary progress"
SHADOW_STATE = "shadow state"

# Alert rules on results: states by rule.
ALERT_RULES = "alert rules"

# Readings that wait to be sent to the collector, and ranges of rows that were sent.
SAMPLE_REQUESTS = "sample requests"

# Open alerts of the task: this and the alert's id.
OPEN_ALERT_PREFIX = "open alert "

# The device itself, under the empty task name: the storage alert; the desired state of a topic.
STORAGE_ALERT = "storage alert"
DESIRED_STATE_PREFIX = "desired state "
