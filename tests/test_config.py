"""Where a setting comes from, which place wins, and what a bad value says."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit import config
from toolkit.config import Settings, as_environment, configure, resolve, shown
from toolkit.errors import SettingError


def test_every_place_beats_the_one_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [resolve()]
    (tmp_path / "toolkit.toml").write_text('redis_host = "from-file"')
    hosts.append(resolve())
    monkeypatch.setenv("REDIS_HOST", "from-environment")
    hosts.append(resolve())
    configure(redis_host="from-configure")
    hosts.append(resolve())
    hosts.append(resolve(redis_host="from-argument"))

    assert [(s.redis_host, s.sources["redis_host"]) for s in hosts] == [
        ("localhost", "default"),
        ("from-file", str(tmp_path / "toolkit.toml")),
        ("from-environment", "$REDIS_HOST"),
        ("from-configure", "tk.configure"),
        ("from-argument", "argument"),
    ]


def test_the_nearest_settings_file_upwards_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toolkit.toml").write_text("redis_port = 7000")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "toolkit.toml").write_text("REDIS_PORT = 7001")
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")

    assert resolve().redis_port == 7001


def test_relative_path_in_a_settings_file_starts_at_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOOLKIT_DATASETS_DIR")
    (tmp_path / "toolkit.toml").write_text('datasets_dir = "photos"')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")

    assert resolve().datasets_dir == tmp_path / "photos"


def test_settings_file_written_by_an_editor_that_adds_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "toolkit.toml").write_bytes(b"\xef\xbb\xbfredis_port = 7000")

    assert resolve().redis_port == 7000


@pytest.mark.parametrize("content", [b"redis_port = ", b"redis_host = '\xff'"])
def test_settings_file_that_is_not_toml_names_itself(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "toolkit.toml").write_bytes(content)

    with pytest.raises(SettingError, match="TOML") as caught:
        resolve()

    assert str(tmp_path / "toolkit.toml") in str(caught.value)


def test_environment_changed_after_import_is_seen_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = resolve().redis_port
    monkeypatch.setenv("REDIS_PORT", "7777")

    assert (before, resolve().redis_port) == (6379, 7777)


def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "")

    assert resolve().redis_port == 6379


def test_none_takes_a_configured_value_back_and_is_no_argument() -> None:
    configure(redis_host="elsewhere", redis_port=1)
    configure(redis_host=None)

    found = resolve(redis_port=None)

    assert (found.redis_host, found.redis_port) == ("localhost", 1)


def test_names_work_in_either_case_and_as_variables() -> None:
    configure(REDIS_PORT=7000, TOOLKIT_MODEL="vit", Namespace="mine")

    found = resolve()

    assert (found.redis_port, found.model, found.namespace) == (7000, "vit", "mine")


def test_one_bad_value_changes_nothing() -> None:
    configure(redis_host="kept")

    with pytest.raises(SettingError):
        configure(redis_host="lost", redis_db=7)
    with pytest.raises(SettingError):
        configure(redis_host=None, redis_port=-1)

    assert resolve().redis_host == "kept"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("redis_port", "many", "a whole number from 1 to 65535"),
        ("redis_port", 65536, "a whole number from 1 to 65535"),
        ("redis_port", True, "a whole number from 1 to 65535"),
        ("redis_broker_db", -1, "a whole number from 0 to "),
        ("celery_max_retries", 2.5, "a whole number from 0 to 100"),
        ("celery_task_time_limit", "nan", "a number of seconds above 0"),
        ("celery_task_time_limit", 0, "a number of seconds above 0"),
        ("stall_s", "inf", "a number of seconds above 0 and below 1000000"),
        ("distributed_available", "maybe", "true or false"),
        ("namespace", "a:run:b", "1 to 64 letters, digits, dots"),
        ("data_dir", "", "a text that is not empty"),
        ("log_level", "LOUD", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ],
)
def test_bad_value_is_refused_with_what_is_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        configure(**{name: value})

    assert caught.value.allowed.startswith(allowed)
    assert f"{name}={value!r} (from tk.configure)" in str(caught.value)


@pytest.mark.parametrize("name", sorted(config._FIELDS.keys() - {"worker_roots"}))
def test_no_setting_of_one_value_takes_a_list(tmp_path: Path, name: str) -> None:
    (tmp_path / "toolkit.toml").write_text(f"{name} = [1, 2]")

    with pytest.raises(SettingError, match=name):
        resolve()


def test_address_that_kubernetes_puts_into_the_port_gets_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6379")

    with pytest.raises(SettingError, match=r"\$?REDIS_PORT.*Kubernetes.*REDIS_PORT=6379"):
        resolve()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("redis_hots", "redis_host"),
        ("REDIS_HOTS", "REDIS_HOST"),
        ("datadir", "data_dir"),
        ("zzz", "one of redis_url, redis_host"),
    ],
)
def test_unknown_name_gets_the_nearest_one(wrong: str, right: str) -> None:
    with pytest.raises(SettingError, match=f"no setting '{wrong}'.*use {right}"):
        configure(**{wrong: "x"})


def test_unknown_name_in_a_settings_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toolkit.toml").write_text("redis_prot = 1")

    with pytest.raises(SettingError, match=r"redis_prot.*toolkit\.toml.*redis_port"):
        resolve()


def test_soft_limit_above_the_hard_one_is_refused_with_both() -> None:
    configure(celery_task_soft_time_limit=301)

    with pytest.raises(SettingError, match=r"301\.0 \(from tk\.configure\).*at most.*300 s"):
        resolve()
    assert resolve(celery_task_time_limit=301).celery_task_soft_time_limit == 301


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:secret@10.0.0.5:6379/0", "redis://:***@10.0.0.5:6379/0"),
        ("rediss://me:secret@[::1]:6379", "rediss://me:***@[::1]:6379"),
        ("redis://:se/cr@et@host", "redis://:***@host"),
        ("redis://host/0?password=secret&db=1", "redis://host/0?password=***&db=1"),
        ("redis://:secret@host:port", "redis://:***@host:port"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_password_is_masked_wherever_settings_are_shown(url: str, masked: str) -> None:
    settings = resolve(redis_url=url)

    assert shown(settings, "redis_url") == masked
    assert masked in repr(settings)
    assert "secret" not in repr(settings)


def test_token_of_the_monitor_is_neither_shown_nor_handed_on() -> None:
    settings = resolve(monitor_token="secret")

    assert "secret" not in repr(settings)
    assert shown(settings, "monitor_token") == "***"
    assert as_environment(settings)["TOOLKIT_MONITOR_TOKEN"] == ""


@pytest.mark.parametrize("value", [" abc", "abc ", "abc\n", " ", "schlüssel", "a\tb"])
def test_token_that_no_header_carries_unchanged_is_refused_unshown(value: str) -> None:
    with pytest.raises(SettingError) as caught:
        resolve(monitor_token=value)

    assert str(caught.value) == (
        "monitor_token='***' (from argument) is not allowed; use letters, digits and signs of "
        "ASCII, with no blank at either end"
    )


@pytest.mark.parametrize(
    ("value", "token"), [("abc", "abc"), ("a b", "a b"), ("!", "!"), ("", None)]
)
def test_token_is_kept_as_it_is(value: str, token: str | None) -> None:
    assert resolve(monitor_token=value).monitor_token == token


def test_settings_show_each_value_and_its_source(tmp_path: Path) -> None:
    configure(redis_port=7000)

    rows = dict(line.split(None, 1) for line in repr(resolve()).splitlines())

    assert rows["REDIS_PORT"] == "7000  (tk.configure)"
    assert rows["REDIS_HOST"] == "localhost  (default)"
    assert rows["TOOLKIT_DATA_DIR"] == f"{tmp_path / 'data'}  ($TOOLKIT_DATA_DIR)"


def test_process_that_gets_the_settings_as_environment_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(
        redis_url="redis://:pw@host/0",
        distributed_available=False,
        stall_s=1.5,
        data_dir=tmp_path / "with space é",
        celery_task_soft_time_limit="12",
    )
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)

    assert resolve() == settings
    assert settings != Settings()


def test_paths_are_absolute_and_the_home_folder_is_filled_in(tmp_path: Path) -> None:
    settings = resolve(datasets_dir="relative/folder", data_dir="~/data")

    assert settings.datasets_dir == tmp_path / "relative" / "folder"
    assert settings.data_dir == Path.home() / "data"
