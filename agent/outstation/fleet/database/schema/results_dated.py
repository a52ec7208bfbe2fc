"""View `results_dated`: results with an estimate of the time at which each was made.

`time_quality`, from best to worst, with the bound `t_error_us` on |t_best - true time|:
- `synced`: a time service had synchronised the clock. t_best = t
- `anchored`: a time service synchronised the clock earlier or later in the same boot. t_best = the time of that anchor
  plus the boot-time clock in between
- `interval`: never synchronised in this boot, but before and after it. Boots between two known times are placed end to
  end in the middle of the free time, which keeps their order and spacing; the bound is half of the free time
- `producer`: the producer sent the time, and not from the clock of this machine. t_best = t, without a bound
- `unknown`: no time source is known (yet). t_best = t, without a bound
"""

from __future__ import annotations

from outstation.fleet.database.schema.message_tables import RESULTS
from outstation.foundation.clock import MAX_ERROR_US

# Parts per million by which a boot-time clock may be fast or slow: 100.
PPM = "CAST(1e-4 AS DOUBLE PRECISION)"
_SLACK_US = 1_000_000

# One flat join with one index look-up per row and table: nested, SQLite would repeat it for each use of a column.
_SELECT = f"""
    boot, boot_us,
    CASE time_quality WHEN 'anchored' THEN anchored_us WHEN 'interval' THEN boot_us + start_us ELSE t END AS t_best,
    CAST(CASE time_quality
        WHEN 'synced' THEN coalesce(anchor_error + GREATEST(abs(anchored_us - t), disagreement_us), {MAX_ERROR_US})
            + {_SLACK_US}
        WHEN 'anchored' THEN anchor_error + disagreement_us + {_SLACK_US}
        WHEN 'interval' THEN start_error_us + {PPM} * boot_us + {_SLACK_US}
        END AS BIGINT) AS t_error_us,
    time_quality, missing, outputs, faults, n, incomplete, model, version, digest, agent, runtime, config
FROM (
    SELECT *, boot_us + CASE WHEN before_error <= coalesce(after_error, before_error) THEN before_offset
                        ELSE after_offset END AS anchored_us,
           LEAST(coalesce(before_error, after_error), coalesce(after_error, before_error)) AS anchor_error,
           CASE WHEN segment = 0 THEN 'producer'
                WHEN quality = 0 AND coalesce(synced, 1) = 1 THEN 'synced'
                WHEN before_error IS NOT NULL OR after_error IS NOT NULL THEN 'anchored'
                WHEN boot_us IS NOT NULL AND start_us IS NOT NULL THEN 'interval'
                ELSE 'unknown' END AS time_quality
    FROM (
        SELECT r.*, s.boot, s.segment, s.quality, r.t - g.offset_us AS boot_us, g.synced,
               b.wall_us - b.boot_us AS before_offset, a.wall_us - a.boot_us AS after_offset,
               b.error_us + {PPM} * (r.t - g.offset_us - b.boot_us) AS before_error,
               a.error_us + {PPM} * (a.boot_us - r.t + g.offset_us) AS after_error,
               o.disagreement_us, o.start_us, o.start_error_us,
               d.missing, d.outputs, m.faults, m.n, m.incomplete,
               p.model, p.version, p.digest, p.agent, p.runtime, p.config
        FROM results r
        LEFT JOIN result_details d
            ON d.device = r.device AND d.log = r.log AND d.seq = r.seq AND d.row = r.row
        LEFT JOIN result_messages m ON m.device = r.device AND m.log = r.log AND m.seq = r.seq
        LEFT JOIN result_provenance p ON p.device = m.device AND p.provenance = m.provenance
        LEFT JOIN stamps s ON s.device = r.device AND s.log = r.log AND s.seq = r.seq AND s.first = (
            SELECT max(first) FROM stamps x
            WHERE x.device = r.device AND x.log = r.log AND x.seq = r.seq AND x.first <= r.row)
        LEFT JOIN segments g ON g.device = r.device AND g.log = r.log AND g.boot = s.boot AND g.segment = s.segment
        LEFT JOIN boots o ON o.device = r.device AND o.log = r.log AND o.boot = s.boot
        LEFT JOIN anchors b ON b.device = r.device AND b.log = r.log AND b.seq = (
            SELECT seq FROM anchors x WHERE x.trusted AND x.device = r.device AND x.log = r.log AND x.boot = s.boot
            AND x.boot_us <= r.t - g.offset_us ORDER BY x.boot_us DESC LIMIT 1)
        LEFT JOIN anchors a ON a.device = r.device AND a.log = r.log AND a.seq = (
            SELECT seq FROM anchors x WHERE x.trusted AND x.device = r.device AND x.log = r.log AND x.boot = s.boot
            AND x.boot_us >= r.t - g.offset_us ORDER BY x.boot_us LIMIT 1)
    ) looked_up
) placed
"""


def create_view(migration: int) -> str:
    """Return the statement that creates the view on the tables after a migration."""
    names = ", ".join(column.name for column in RESULTS.columns if column.added <= migration)
    return f"CREATE VIEW results_dated AS SELECT {names}, {_SELECT}"
