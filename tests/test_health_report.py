"""How a fault is found in what was seen, and how a report reads: without any server."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.test_health import REQUEST, START
from toolkit import config
from toolkit.cluster.registry import WorkerInfo, WorkerState, WorkerView, WorkInfo
from toolkit.health import Check, HealthReport, Status
from toolkit.health.case import Case
from toolkit.health.fault import find_fault
from toolkit.health.report import Verdict
from toolkit.health.trial import Traces
from toolkit.health.workers import Answers


def a_case(**settings: object) -> Case:
    found = config.resolve(redis_host="10.0.0.5", **settings)
    from toolkit.cluster.connection import resolve_address

    return Case(found, REQUEST, resolve_address(found), None)


def a_view(**changes: Any) -> WorkerView:
    info = WorkerInfo("box-1", 17, "box", queues=("v1.abc",), beat_s=2.0, ttl_s=6.0)
    view = WorkerView("box-1", info, WorkInfo(state=WorkerState.READY), True, True, 1.0)
    return dataclasses.replace(view, **changes)


@pytest.mark.parametrize(
    ("view", "said", "traces", "says", "cure"),
    [
        ({"beat_age_s": 4.5}, {}, {}, "silent for 4.5 s", "ssh box 'kill -CONT 17'"),
        ({"is_working": False}, {}, {}, "embedding process of worker box-1", "ssh box 'kill 17'"),
        ({}, {}, {"is_held": True}, "did not begin it in 5.0 s", "ssh box 'kill 17'"),
        ({}, {}, {"is_waiting": True}, "ready and idle and does not consume", "ssh box 'kill 17'"),
        ({}, {"strangers": ("a@b",)}, {}, "does not know our task", "--destination a@b"),
        ({}, {}, {}, "refuses its content type", "ssh box 'kill 17'"),
    ],
)
def test_faults_are_told_apart(
    view: dict[str, Any], said: dict[str, Any], traces: dict[str, Any], says: str, cure: str
) -> None:
    check = find_fault(a_case(), [a_view(**view)], Answers(**said), Traces(**traces), 5.0)

    assert (check.name, check.status) == ("consuming", "fail")
    assert says in check.detail
    assert cure in str(check.cure)


def test_commands_hold_what_a_terminal_does_not_know() -> None:
    case = a_case(namespace="cats")

    assert case.start == f"REDIS_HOST=10.0.0.5 TOOLKIT_NAMESPACE=cats {START}"


def test_password_is_in_no_command() -> None:
    found = config.resolve(redis_url=f"redis://:{'hush%2Fword'}@box:7000")
    from toolkit.cluster.connection import resolve_address

    case = Case(found, REQUEST, resolve_address(found), None)

    assert "hush" not in case.start
    assert case.start.startswith("REDIS_URL='redis://:***@box:7000' toolkit worker")


def a_report() -> HealthReport:
    checks = (
        Check("redis", Status.OK, "it answers", latency_ms=0.25),
        Check("workers", Status.FAIL, "none <b>here</b>", "toolkit worker --model m&m"),
        Check("canary", Status.SKIP, "not looked at"),
    )
    return HealthReport(Verdict.LOCAL, "none <b>here</b>", checks)


def test_report_in_a_terminal() -> None:
    assert repr(a_report()).splitlines() == [
        "local: a build would run on this machine alone (none <b>here</b>)",
        "   ok  redis    it answers  (0.2 ms)",
        " FAIL  workers  none <b>here</b>",
        "                → toolkit worker --model m&m",
        " skip  canary   not looked at",
    ]


def test_report_in_a_notebook_is_escaped_and_styled_inline() -> None:
    html = a_report()._repr_html_()

    assert "<b>here" not in html
    assert html.count("none &lt;b&gt;here&lt;/b&gt;") == 2
    assert "<code>toolkit worker --model m&amp;m</code>" in html
    assert "<style" not in html
    assert "class=" not in html


def test_report_as_json() -> None:
    value = a_report().to_json()

    assert value["verdict"] == "local"
    assert set(value) == {"verdict", "checks"}
    assert value["checks"][1] == {
        "name": "workers",
        "status": "fail",
        "detail": "none <b>here</b>",
        "cure": "toolkit worker --model m&m",
        "latency_ms": None,
    }


def test_checks_are_true_when_they_work() -> None:
    words = [Status.OK, Status.WARN, Status.FAIL, Status.SKIP]

    assert [bool(Check("x", word, "")) for word in words] == [True, True, False, False]
