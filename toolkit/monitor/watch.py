"""The doctor's quick look, renewed beside whoever reads it.

Law: a reader waits for a slow look only where that asks for it, and looking never takes more
than a share of the time, however many read and whatever changes.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

from toolkit.config import Settings
from toolkit.errors import ToolkitError
from toolkit.health import Check, check_health

#: Seconds for which a look counts, at least and at most.
LEAST_REST_S, MOST_REST_S = 5.0, 45.0

#: A look counts for so many times the seconds it took; less when something has changed.
REST, REST_AFTER_NEWS = 50.0, 5.0

#: Seconds after which a look is too old to be handed out.
MOST_AGE_S = 60.0

#: Seconds that a reader waits when there is no look to hand out, or something has changed.
WAIT_S = 1.0

#: Seconds that a reader waits who has come for the answer alone: a look takes up to 8.
PATIENCE_S = 10.0

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """What the doctor found.

    Attributes:
        verdict: ``distributed``, ``local`` or ``broken``; ``None`` while nobody has looked.
        reason: Why the workers are not used, or why nothing works; ``None`` if they are.
        checks: As :class:`toolkit.health.HealthReport` has them.
        age_s: Seconds since that was so.
    """

    verdict: str | None = None
    reason: str | None = None
    checks: tuple[Check, ...] = ()
    age_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What ``toolkit doctor --json`` prints, with the reason and the age."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "checks": [check.to_json() for check in self.checks],
            "age_s": round(self.age_s, 1),
        }


class HealthWatch:
    """Looks again when a look is old, or when something has changed.

    Args:
        settings: Of whoever asks.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: What was known when a look was begun, and when a reader waited for one.
        self._signs: object = None
        self._waited_for: object = None
        self._found = Health()
        self._looked_at = 0.0
        self._due_at = 0.0
        self._due_after_news_at = 0.0

    def health(self, signs: object, wait_s: float = WAIT_S) -> Health:
        """What was found last, if that is not too old.

        Args:
            signs: What is known of server and workers; other signs ask for another look.
            wait_s: Seconds to wait for a look where there is none to hand out.
        """
        with self._lock:
            is_idle = self._thread is None or not self._thread.is_alive()
            due_at = self._due_at if signs == self._signs else self._due_after_news_at
            if is_idle and time.monotonic() >= due_at:
                self._signs = signs
                self._thread = threading.Thread(target=self._look, name="health", daemon=True)
                self._thread.start()
            thread = self._thread
            # Once for each change: while it rests, or is slow, the last look has to do.
            is_news = signs == self._signs != self._waited_for
            self._waited_for = self._signs
        if thread is not None and (is_news or not self._is_fresh):
            thread.join(wait_s)
        if not self._is_fresh:
            return Health()
        return dataclasses.replace(self._found, age_s=time.monotonic() - self._looked_at)

    @property
    def _is_fresh(self) -> bool:
        is_known = self._found.verdict is not None
        return is_known and time.monotonic() - self._looked_at < MOST_AGE_S

    def _look(self) -> None:
        begun = time.monotonic()
        try:
            report = check_health(settings=self._settings, deep=False)
            self._found = Health(report.verdict, report.reason, report.checks)
        except ToolkitError as error:
            self._found = Health("broken", str(error))
        except Exception as error:
            logger.exception("the doctor's look failed")
            self._found = Health("broken", f"the doctor failed ({type(error).__name__}: {error})")
        self._looked_at = time.monotonic()
        took_s = self._looked_at - begun
        self._due_after_news_at = self._looked_at + REST_AFTER_NEWS * took_s
        self._due_at = self._looked_at + min(max(REST * took_s, LEAST_REST_S), MOST_REST_S)
