"""Workers are ready and idle and nobody begins a batch: whose fault it is. Pure: no server."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from toolkit.cluster.registry import WorkerState, WorkerView
from toolkit.health.case import Case, on_its_host
from toolkit.health.report import Check, Status
from toolkit.health.trial import Traces
from toolkit.health.workers import Answers

#: Beats that a worker may be late before it counts as stopped.
_LATE_BEATS = 2.0


def find_fault(
    case: Case, suspects: Sequence[WorkerView], said: Answers, traces: Traces, waited_s: float
) -> Check:
    """Tell apart: stopped, hung, not consuming, another app, content refused.

    Args:
        case: What is looked at.
        suspects: Those that could be used when the batch was sent, as they are now.
        said: What Celery's own channel says.
        traces: Where the batch is now.
        waited_s: For how long it was waited for.
    """
    for view in suspects:
        if view.beat_age_s > _LATE_BEATS * view.info.beat_s:
            return _failed(
                f"{view} has been silent for {view.beat_age_s:.1f} s and beats every "
                f"{view.info.beat_s:g} s: it was stopped, or its machine hangs",
                on_its_host(view, f"kill -CONT {view.pid}"),
            )
        if view.state is WorkerState.STALE:
            return _failed(f"the embedding process of {view} fell silent", case.restart(view))
    names = ", ".join(map(str, suspects[:3])) or "a worker that is gone now"
    restart = case.restart(suspects[0]) if suspects else case.start
    if traces.is_held:
        return _failed(f"{names} took a batch and did not begin it in {waited_s:.1f} s", restart)
    if traces.is_waiting:
        detail = f"{names} is ready and idle and does not consume {case.queue}"
        return _failed(f"{detail}: nothing was taken in {waited_s:.1f} s", restart)
    if said.strangers:
        (first, *_) = said.strangers
        stop = f"celery -A toolkit control shutdown --destination {shlex.quote(first)}"
        return _failed(f"{first} takes our batches and does not know our task", stop)
    return _failed(
        f"a batch was taken off {case.queue} and thrown away unread: {names} refuses its content "
        "type (application/json), so it was started with other settings of Celery",
        restart,
    )


def _failed(detail: str, cure: str) -> Check:
    return Check("consuming", Status.FAIL, detail, cure)
