"""What a check found, and how a whole report reads in a terminal, a notebook and as JSON."""

from __future__ import annotations

import dataclasses
import enum
from html import escape
from typing import Any


class Status(enum.StrEnum):
    """How a check came out.

    ``warn``: it works, and something should be mended. ``fail``: a road is closed by it.
    ``skip``: it was not looked at, and the detail says why.
    """

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Verdict(enum.StrEnum):
    """What a build would do now.

    ``distributed``: use workers. ``local``: work, in this machine's own process alone.
    ``broken``: fail.
    """

    DISTRIBUTED = "distributed"
    LOCAL = "local"
    BROKEN = "broken"


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; true if it works.

    Attributes:
        name: What was looked at; the same in every release.
        status: How it came out.
        detail: The evidence, in one sentence.
        cure: The command that mends it, if there is something to mend.
        latency_ms: How long the thing itself took, where that says something.
    """

    name: str
    status: Status
    detail: str
    cure: str | None = None
    latency_ms: float | None = None

    def __bool__(self) -> bool:
        return self.status in (Status.OK, Status.WARN)

    def __str__(self) -> str:
        cure = f"\n  → {self.cure}" if self.cure else ""
        return f"{self.name}: {self.status} · {self.detail}{cure}"

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class HealthReport:
    """Every check, and what follows from them.

    Attributes:
        verdict: What a build would do now.
        reason: Why the workers are not used, or why nothing works; ``None`` if they are.
        checks: In the order in which one thing rests on another.
    """

    verdict: Verdict
    reason: str | None
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """What ``toolkit doctor --json`` prints."""
        return {"verdict": self.verdict, "checks": [check.to_json() for check in self.checks]}

    def __repr__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [_headline(self)]
        for check in self.checks:
            took = f"  ({_took(check)})" if check.latency_ms is not None else ""
            lines.append(f"{_word(check):>5}  {check.name:<{width}}  {check.detail}{took}")
            if check.cure:
                lines.append(f"{'':>5}  {'':<{width}}  → {check.cure}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(map(_row_html, self.checks))
        colour = _VERDICT_COLOURS[self.verdict]
        head, _, reason = _headline(self).partition(": ")
        badge = (
            f'<b style="background:{colour};color:#fff;padding:2px 8px;border-radius:4px">'
            f"{escape(head)}</b> {escape(reason)}"
        )
        return f'<div>{badge}<table style="text-align:left">{rows}</table></div>'


_VERDICT_COLOURS = {
    Verdict.DISTRIBUTED: "#1a7f37",
    Verdict.LOCAL: "#9a6700",
    Verdict.BROKEN: "#c6222f",
}
_SIGNS = {
    Status.OK: ("✓", "#1a7f37"),
    Status.WARN: ("!", "#9a6700"),
    Status.FAIL: ("✗", "#c6222f"),
    Status.SKIP: ("·", "#808080"),
}
_MEANINGS = {
    Verdict.DISTRIBUTED: "a build would use the workers",
    Verdict.LOCAL: "a build would run on this machine alone",
    Verdict.BROKEN: "a build would fail",
}


def _headline(report: HealthReport) -> str:
    reason = f" ({report.reason})" if report.reason else ""
    return f"{report.verdict}: {_MEANINGS[report.verdict]}{reason}"


def _word(check: Check) -> str:
    # What blocks is to be found in a long table at a glance.
    return check.status.upper() if check.status is Status.FAIL else str(check.status)


def _took(check: Check) -> str:
    took_ms = check.latency_ms or 0.0
    return f"{took_ms:.1f} ms" if took_ms < 1000 else f"{took_ms / 1000:.1f} s"


def _row_html(check: Check) -> str:
    sign, colour = _SIGNS[check.status]
    faded = ";opacity:.6" if check.status is Status.SKIP else ""
    cell = f'<td style="text-align:left;vertical-align:top;padding:2px 8px{faded}">'
    cure = f"<br>→ <code>{escape(check.cure)}</code>" if check.cure else ""
    took = _took(check) if check.latency_ms is not None else ""
    return (
        f'<tr>{cell}<b style="color:{colour}">{sign} {check.status}</b></td>'
        f"{cell}{escape(check.name)}</td>{cell}{escape(check.detail)}{cure}</td>"
        f"{cell}{took}</td></tr>"
    )
