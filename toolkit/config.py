"""Settings: one frozen value, resolved at the edge of each call, never deep inside.

Law: argument > :func:`configure` > environment > ``toolkit.toml`` (searched upwards) >
default. Every value remembers where it came from.
"""

# ruff: noqa: RUF009  (_setting is dataclasses.field with our metadata, which the rule allows)

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from toolkit.errors import SettingError, UnknownSettingError
from toolkit.machine import usable_cpus

#: Name of the settings file, looked for in the working directory and its parents.
SETTINGS_FILE = "toolkit.toml"

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def _bool(value: object) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError("true or false")
    return text in _TRUE


def _whole(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        try:
            number = int(str(value))
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return number

    return parse


def _seconds(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise ValueError("a number of seconds above 0 and below 1000000")
    return number


def _text(value: object) -> str:
    # A file can hold a list or a table where a text belongs.
    if isinstance(value, (list, dict)) or not str(value).strip():
        raise ValueError("a text that is not empty")
    return str(value)


def _namespace(value: object) -> str:
    # A colon or a star would let it lie inside of another one's keys.
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", str(value)):
        raise ValueError("1 to 64 letters, digits, dots, dashes or underscores")
    return str(value)


def _level(value: object) -> str:
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if str(value).upper() not in levels:
        raise ValueError("one of " + ", ".join(levels))
    return str(value).upper()


def _optional_text(value: object) -> str | None:
    return None if value is None or not str(value).strip() else _text(value)


def _token(value: object) -> str | None:
    # It travels in a header, where other letters and outer blanks do not arrive as they are.
    if value is None or value == "":
        return None
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", str(value)):
        raise ValueError("letters, digits and signs of ASCII, with no blank at either end")
    return _text(value)


def _path(value: object) -> Path:
    return Path(_text(value)).expanduser().absolute()


def _roots(value: object) -> tuple[Path, ...]:
    parts = value if isinstance(value, (list, tuple)) else str(value).split(os.pathsep)
    return tuple(_path(part) for part in parts if str(part).strip())


def _engine(value: object) -> str:
    if value in ("auto", "torch"):
        return str(value)
    raise ValueError("'auto' or 'torch'")


def _batch_size(value: object) -> int | None:
    if value is None or str(value).strip().lower() == "auto":
        return None
    try:
        return _whole(1, 4096)(value)
    except ValueError as error:
        raise ValueError(f"auto, or {error}") from None


def _port(value: object) -> int:
    if "://" in str(value):
        # Kubernetes puts the address of a service called "redis" into this variable.
        raise ValueError(
            "the port's number; Kubernetes sets REDIS_PORT to an address for a service named "
            "redis: set REDIS_PORT=6379 in the pod, or give REDIS_URL"
        )
    return _whole(1, 65535)(value)


def _setting(env: str, parse: Callable[[object], Any], default: Any) -> Any:
    metadata = {"env": env, "parse": parse}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, validated.

    Attributes:
        redis_url: Whole address of the server, password and TLS included.
        redis_host: Host of the server.
        redis_port: Port of the server.
        redis_broker_db: Database of the queues.
        redis_backend_db: Database of results, blobs, registry and progress.
        celery_task_time_limit: Hard limit of a batch in seconds.
        celery_task_soft_time_limit: Soft limit of a batch in seconds.
        celery_max_retries: Times an image that killed or hung a process goes out again.
        distributed_available: ``False`` switches the workers off.
        datasets_dir: Folder whose folders are the datasets that have names.
        data_dir: Folder of the vector store, the indexes, the runs and the weights.
        model: timm name of the model a build uses when it names none.
        namespace: Prefix of every key on the server.
        device: ``auto``, ``cpu`` or a torch device such as ``cuda:0``.
        engine: ``auto`` runs models with the fastest engine that changes no vector; ``torch``
            with torch alone.
        engine_dir: Where models are kept that were exported to another engine than torch.
        threads: Threads of one embedding process.
        batch_size: Images that go through the model at once; ``None`` (written ``auto``)
            takes what the device does best.
        stall_s: Seconds without progress after which an embedding process counts as hung.
        beat_s: Seconds between two heartbeats of a worker.
        beat_ttl_s: Seconds after its last heartbeat for which a worker counts as alive.
        require_wait_s: Seconds for which a build that requires workers waits for one.
        worker_roots: Folders under which a worker reads files by their path; empty means the
            datasets folder. What lies elsewhere is sent to it.
        max_pixels: Pictures with more pixels are refused before they are decoded.
        follow_links: Whether a scan follows symbolic links; loops are cut.
        monitor_token: What the monitor's visitors must know to change something; ``None``
            lets everybody on this machine, and nobody from elsewhere.
        log_level: Level of the command line's log.
    """

    redis_url: str | None = _setting("REDIS_URL", _optional_text, None)
    redis_host: str = _setting("REDIS_HOST", _text, "localhost")
    redis_port: int = _setting("REDIS_PORT", _port, 6379)
    redis_broker_db: int = _setting("REDIS_BROKER_DB", _whole(0, 1 << 20), 0)
    redis_backend_db: int = _setting("REDIS_BACKEND_DB", _whole(0, 1 << 20), 1)
    celery_task_time_limit: float = _setting("CELERY_TASK_TIME_LIMIT", _seconds, 300.0)
    celery_task_soft_time_limit: float = _setting("CELERY_TASK_SOFT_TIME_LIMIT", _seconds, 240.0)
    celery_max_retries: int = _setting("CELERY_MAX_RETRIES", _whole(0, 100), 3)
    distributed_available: bool = _setting("DISTRIBUTED_AVAILABLE", _bool, True)
    datasets_dir: Path = _setting("TOOLKIT_DATASETS_DIR", _path, lambda: _path("datasets"))
    data_dir: Path = _setting(
        "TOOLKIT_DATA_DIR", _path, lambda: platformdirs.user_data_path("image-index-toolkit")
    )
    model: str = _setting("TOOLKIT_MODEL", _text, "tf_efficientnet_lite0")
    namespace: str = _setting("TOOLKIT_NAMESPACE", _namespace, "toolkit")
    device: str = _setting("TOOLKIT_DEVICE", _text, "auto")
    engine: str = _setting("TOOLKIT_ENGINE", _engine, "auto")
    engine_dir: Path = _setting(
        "TOOLKIT_ENGINE_DIR",
        _path,
        lambda: platformdirs.user_cache_path("image-index-toolkit") / "engines",
    )
    threads: int = _setting("TOOLKIT_THREADS", _whole(1, 1024), usable_cpus)
    batch_size: int | None = _setting("TOOLKIT_BATCH_SIZE", _batch_size, None)
    stall_s: float = _setting("TOOLKIT_STALL_S", _seconds, 30.0)
    beat_s: float = _setting("TOOLKIT_BEAT_S", _seconds, 2.0)
    beat_ttl_s: float = _setting("TOOLKIT_BEAT_TTL_S", _seconds, 6.0)
    require_wait_s: float = _setting("TOOLKIT_REQUIRE_WAIT_S", _seconds, 60.0)
    worker_roots: tuple[Path, ...] = _setting("TOOLKIT_WORKER_ROOTS", _roots, ())
    max_pixels: int = _setting("TOOLKIT_MAX_PIXELS", _whole(1, 1 << 31), 200_000_000)
    follow_links: bool = _setting("TOOLKIT_FOLLOW_LINKS", _bool, False)
    monitor_token: str | None = _setting("TOOLKIT_MONITOR_TOKEN", _token, None)
    log_level: str = _setting("TOOLKIT_LOG_LEVEL", _level, "WARNING")
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def visibility_timeout_s(self) -> float:
        """Seconds after which the server gives out again what no worker acknowledged.

        A backstop: deadlines are the client's. It must exceed what a batch may take.
        """
        return 2 * self.celery_task_time_limit + 60

    def __repr__(self) -> str:
        rows = [
            (field.metadata["env"], shown(self, field.name), self.sources.get(field.name, ""))
            for field in _FIELDS.values()
        ]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}  ({source})" for name, value, source in rows)


_FIELDS = {f.name: f for f in dataclasses.fields(Settings) if "env" in f.metadata}
_BY_ENV = {f.metadata["env"]: f for f in _FIELDS.values()}
_configured: dict[str, object] = {}

#: Settings whose default stands for more than its value.
_OPEN = ("redis_host", "redis_port")


def shown(settings: Settings, name: str) -> str:
    """A setting as it may be printed: a password is masked."""
    value = _written(getattr(settings, name))
    if name == "monitor_token":
        return "***" * bool(value)
    return masked(value) if name == "redis_url" else value


def masked(url: str) -> str:
    """An address as it may be printed: its password is masked."""
    # Up to the last @, not by urlsplit: a password with a slash in it must not show either.
    if "://" not in url:  # no address at all: all of it may be a secret
        url = re.sub(r".*@", "***@", url)
    without = re.sub(r"(://[^:@/]*:).*@", r"\1***@", url)
    return re.sub(r"(\bpassword=)[^&]*", r"\1***", without)


def configure(**values: object) -> None:
    """Set settings for the later calls of this process; ``None`` takes one back.

    Args:
        **values: Settings by their names, in either case: ``redis_host=…``, ``data_dir=…``.

    Raises:
        SettingError: If a name is unknown or a value is not allowed. Nothing is changed then.
    """
    parsed = {}
    for name, value in values.items():
        field = _field(name, "tk.configure")
        if value is not None:
            parsed[field.name] = _parse(field, name, value, "tk.configure")
    for name in values:
        _configured.pop(_field(name, "tk.configure").name, None)
    _configured.update(parsed)


def resolve(**arguments: object) -> Settings:
    """The settings as they are at this moment.

    Args:
        **arguments: Values that beat every other place; ``None`` means not given.

    Raises:
        SettingError: If any place holds a value that is not allowed, or a name nobody knows.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_FIELDS, "default")
    for source, found in _places(arguments):
        for name, value in found.items():
            field = _field(name, source)
            values[field.name] = _parse(field, name, value, source)
            sources[field.name] = source if source != "environment" else f"${name}"
    settings = Settings(**values, sources=sources)
    if settings.beat_ttl_s < 2 * settings.beat_s:
        raise SettingError(
            "TOOLKIT_BEAT_TTL_S",
            settings.beat_ttl_s,
            f"at least twice TOOLKIT_BEAT_S ({settings.beat_s:g} s)",
            sources["beat_ttl_s"],
        )
    if settings.celery_task_soft_time_limit > settings.celery_task_time_limit:
        raise SettingError(
            "CELERY_TASK_SOFT_TIME_LIMIT",
            settings.celery_task_soft_time_limit,
            f"at most CELERY_TASK_TIME_LIMIT ({settings.celery_task_time_limit:g} s)",
            sources["celery_task_soft_time_limit"],
        )
    return settings


def _places(arguments: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    """Where settings come from, the weakest first."""
    environment = {env: os.environ[env] for env in _BY_ENV if os.environ.get(env)}
    file, found = _settings_file()
    given = {name: value for name, value in arguments.items() if value is not None}
    return [
        (str(file), found),
        ("environment", environment),
        ("tk.configure", _configured),
        ("argument", given),
    ]


def _settings_file() -> tuple[Path | None, Mapping[str, object]]:
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / SETTINGS_FILE
        if file.is_file():
            try:
                found = tomllib.loads(file.read_text(encoding="utf-8-sig"))
            except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                allowed = f"a file that can be read as TOML: {error}"
                raise SettingError(SETTINGS_FILE, str(file), allowed) from error
            return file, {name: _beside(file, name, value) for name, value in found.items()}
    return None, {}


def _beside(file: Path, name: str, value: object) -> object:
    """A relative path in a settings file starts at that file, wherever it is found from."""
    parse = _field(name, str(file)).metadata["parse"]
    if parse is _path and isinstance(value, str) and value:
        return file.parent / Path(value).expanduser()
    if parse is _roots and isinstance(value, list):
        return [file.parent / Path(str(part)).expanduser() for part in value]
    return value


def _field(name: str, source: str) -> dataclasses.Field[Any]:
    field = _BY_ENV.get(name) or _BY_ENV.get(name.upper()) or _FIELDS.get(name.lower())
    if field is None:
        names = [*_FIELDS, *_BY_ENV]
        close = difflib.get_close_matches(name, names, n=1) or ["one of " + ", ".join(_FIELDS)]
        raise UnknownSettingError(name, None, close[0], source)
    return field


def _parse(field: dataclasses.Field[Any], name: str, value: object, source: str) -> Any:
    try:
        return field.metadata["parse"](value)
    except ValueError as error:
        told = "***" if field.name == "monitor_token" else value
        raise SettingError(name, told, str(error), source) from None


def as_environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, for a process that this one starts."""
    values: dict[str, object] = {}
    for env, field in _BY_ENV.items():
        # Where nobody said which server, this machine's own cluster may be it: there as here.
        is_open = field.name in _OPEN and settings.sources.get(field.name) == "default"
        # A secret of the monitor's own is nothing for builds and workers.
        is_kept = is_open or field.name == "monitor_token"
        values[env] = None if is_kept else getattr(settings, field.name)
    # An empty variable is no setting, so that what is unset here is unset there.
    return {env: _written(value) for env, value in values.items()}


def _written(value: object) -> str:
    """A value as it stands in a variable."""
    if isinstance(value, tuple):
        return os.pathsep.join(map(str, value))
    return "" if value is None else str(value)
