"""Page *labels*: results that should get a label, numbers of verdicts, and signs of feedback loops."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import QueryParams
from starlette.responses import Response

from outstation.fleet.dashboard.pages import views
from outstation.fleet.dashboard.pages.visit import Visit
from outstation.fleet.database.interface import Connection
from outstation.fleet.labelling import candidates, feedback_loops, verdicts

_LISTED, _MAX_LISTED = 20, 200
_DEFAULTS = {"device": "", "task": "", "n": _LISTED}


class LabelsQuery(msgspec.Struct, frozen=True):
    device: str
    task: str
    n: int

    @classmethod
    def parse(cls, query: QueryParams) -> LabelsQuery:
        limit = views.parse_limit(query, _LISTED, _MAX_LISTED)
        return cls(query.get("device", "")[:64], query.get("task", "")[:64], limit)

    def path(self, **changes: object) -> str:
        return views.query_path("/labels", {**msgspec.structs.asdict(self), **changes}, _DEFAULTS)


async def show(visit: Visit) -> Response:
    query = LabelsQuery.parse(visit.request.query_params)
    device, task = query.device or None, query.task or None

    def load(db: Connection) -> dict[str, Any]:
        return {
            "requests": candidates.list_next(db, device=device, task=task, limit=query.n),
            "summary": verdicts.summarize(db, device, task),
            "warnings": feedback_loops.find(db, device, task),
        }

    loaded = await visit.dashboard.reader.read(load)
    requests = loaded["requests"]
    return visit.render(
        "labels.html",
        title="Labels",
        watch="labels",
        query=query,
        known_labels=sorted({each.label for each in requests if each.label is not None}),
        can_judge=visit.visitor.may("operator"),
        more=min(query.n * 3, _MAX_LISTED) if len(requests) == query.n and query.n < _MAX_LISTED else 0,
        **loaded,
    )
