"""All checks in their order, and the verdict: what a build would do now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolkit import config
from toolkit.cluster.connection import connect, connect_broker, mapped_errors, resolve_address
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ServerError, SettingError
from toolkit.health import canary, server, workers
from toolkit.health.case import Case
from toolkit.health.machine import Here, look_here
from toolkit.health.report import Check, HealthReport, Status, Verdict

#: What is looked at on the way to the workers; each rests on those before it.
ROAD_CHECKS = (
    *("settings", "redis", "databases", "memory", "exposure", "workers", "task"),
    *("consuming", "queue", "canary", "paths", "clock"),
)


def check_health(
    model: str | None = None, *, settings: Settings | None = None, deep: bool = True, **encoder: Any
) -> HealthReport:
    """Find out what a build would do now, why, and what mends what is wrong.

    A picture is embedded here and, when a worker is idle, on a worker; both must agree. With
    everything at hand this takes a second more than loading the model; a worker that takes
    nothing costs five.

    Args:
        model: timm name; ``None`` is the setting ``TOOLKIT_MODEL``.
        settings: Instead of those of this moment.
        deep: Whether to load the model on this machine. Without it the local road is taken
            for open, and no picture is sent while a worker is busy.
        **encoder: What else :func:`toolkit.build_index` takes of an encoder: ``pretrained``, ….

    Raises:
        SettingError: If a setting has a value that is not allowed.
        ModelError: If ``model`` is no name of a model.
    """
    settings = settings or config.resolve()
    request = _request(model, settings, encoder)
    here = look_here(request, settings, deep=deep)
    road = look_along(request, settings, here, deep=deep)
    verdict = _verdict(road, here, deep)
    return HealthReport(verdict, _reason(verdict, road, here), (*road.values(), *here.checks))


def check_redis_connection(*, settings: Settings | None = None) -> Check:
    """Whether the server answers and has both databases; true if so.

    Raises:
        SettingError: If a setting has a value that is not allowed.
    """
    settings = settings or config.resolve()
    case = _case(_request(None, settings, {}), settings, Here(()))
    redis, databases = server.reach(case)
    return redis if databases or not redis else databases


def check_celery_worker(
    model: str | None = None, *, settings: Settings | None = None, **encoder: Any
) -> Check:
    """Whether a worker is registered that a build would use; true if so.

    It takes the workers at their word; :func:`check_health` puts them to the test.

    Args:
        model: timm name; ``None`` is the setting ``TOOLKIT_MODEL``.
        settings: Instead of those of this moment.
        **encoder: As of :func:`check_health`.

    Raises:
        SettingError: If a setting has a value that is not allowed.
    """
    settings = settings or config.resolve()
    request = _request(model, settings, encoder)
    case = _case(request, settings, look_here(request, settings, deep=False))
    try:
        with mapped_errors(case.address), connect(case.address) as backend:
            return workers.check_workers(case, workers.muster(case, backend))
    except ServerError as error:
        failed = server.not_reached(case, error)
        return Check("workers", Status.FAIL, failed.detail, failed.cure)


def try_dispatch(
    model: str | None = None, *, settings: Settings | None = None, **encoder: Any
) -> list[dict[str, Any]]:
    """Send rubbish and a real picture through the real queue.

    Args:
        model: timm name; ``None`` is the setting ``TOOLKIT_MODEL``.
        settings: Instead of those of this moment.
        **encoder: As of :func:`check_health`.

    Returns:
        Of each ``what``, ``id``, ``state`` (``done``, ``failed``, ``refused``, ``lost``,
        ``waiting``, ``held``, ``not sent``), ``seconds`` and ``detail``.

    Raises:
        SettingError: If a setting has a value that is not allowed.
    """
    settings = settings or config.resolve()
    request = _request(model, settings, encoder)
    here = look_here(request, settings, deep=True)
    try:
        if here.spec is not None:
            return canary.try_roads(_case(request, settings, here), here.spec)
        (reason,) = (check.detail for check in here.checks if check.name == "model")
    except ServerError as error:
        reason = str(error)
    return [canary.sent_row("anything", "", "not sent", 0.0, reason)]


def look_along(
    request: EncoderRequest, settings: Settings, here: Here, *, deep: bool = True
) -> dict[str, Check]:
    """The way to the workers, as far as it is open; what lies beyond is skipped."""
    found: dict[str, Check] = {}
    try:
        case = _case(request, settings, here)
    except SettingError as error:
        cure = f"unset {error.name}"
        found["settings"] = Check("settings", Status.FAIL, str(error), cure)
        return _completed(found)
    try:
        for check in _steps(case, here, deep):
            found[check.name] = check
    except ServerError as error:
        # It answered when it was first asked.
        found["redis"] = server.not_reached(case, error)
    return _completed(found)


def _steps(case: Case, here: Here, deep: bool) -> Iterator[Check]:
    yield server.check_settings(case)
    if not case.settings.distributed_available:
        return
    redis, databases = server.reach(case)
    yield from (redis, databases)
    if not (redis and databases):
        return
    address = case.address
    with mapped_errors(address), connect(address) as backend, connect_broker(address) as broker:
        yield server.check_memory(case, backend)
        yield server.check_exposure(case, backend)
        yield server.check_clock(backend)
        yield server.check_queue(case, broker, backend)
        crew = workers.muster(case, backend)
        yield workers.check_workers(case, crew)
        sent = canary.send_canary(case, crew, deep=deep)
        # After it: one that is busy for a second by then is no liar.
        said = workers.inspect(case, crew, broker)
        yield workers.check_task(case, crew, said)
        yield from canary.check_canary(case, sent, said, here, backend)


def _completed(found: Mapping[str, Check]) -> dict[str, Check]:
    """Every check of the road in its order."""
    closed = [c.name for c in found.values() if c.status is Status.FAIL]
    why = f"not looked at: {closed[0]} comes first" if closed else "the workers are switched off"
    # Not get(): a check that failed is false.
    skipped = {name: Check(name, Status.SKIP, why) for name in ROAD_CHECKS}
    return {**skipped, **found}


def _verdict(road: Mapping[str, Check], here: Here, deep: bool) -> Verdict:
    disk, torch, model, _ = here.checks
    if not (disk and road["settings"]):
        return Verdict.BROKEN
    is_proved = not any(road[n].status is Status.FAIL for n in ("consuming", "canary"))
    # A build asks this machine what the encoder is, if that is not on record.
    is_known = here.spec is not None or not deep
    if road["workers"] and is_proved and is_known:
        return Verdict.DISTRIBUTED
    is_local = torch and model.status is not Status.FAIL
    return Verdict.LOCAL if is_local else Verdict.BROKEN


def _reason(verdict: Verdict, road: Mapping[str, Check], here: Here) -> str | None:
    """Why the workers are not used, or why nothing works."""
    if verdict is Verdict.DISTRIBUTED:
        return None
    looked = (*here.checks, *road.values()) if verdict is Verdict.BROKEN else road.values()
    failed = (check.detail for check in looked if check.status is Status.FAIL)
    return next(failed, road["settings"].detail)


def _request(model: str | None, settings: Settings, encoder: Mapping[str, Any]) -> EncoderRequest:
    return EncoderRequest(model=model or settings.model, **encoder)


def _case(request: EncoderRequest, settings: Settings, here: Here) -> Case:
    return Case(settings, request, resolve_address(settings), here.spec)
