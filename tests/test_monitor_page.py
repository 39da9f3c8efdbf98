"""The page in every state: run by Streamlit itself, over real journals and a real server."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import streamlit as st
from streamlit import config as streamlit_config
from streamlit.testing.v1 import AppTest

import toolkit as tk
from tests.pictures import jpeg
from tests.servers import Server, free_port
from tests.support import build, wait_until
from toolkit import config
from toolkit.cluster import registry
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerInfo, WorkerState, WorkInfo
from toolkit.journal import RunJournal
from toolkit.monitor import launch
from toolkit.monitor.views import logs
from toolkit.monitor.views.parts import plain
from toolkit.places import runs_dir
from toolkit.run_record import Accounting, RunRecord, RunState

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "toolkit" / "monitor" / "page.py"

EVIL = (
    "<script>alert(1)</script> *a* $b$ [c](javascript:d) :material/close: a -> b -- c :smile: `e`"
)


@pytest.fixture(autouse=True)
def _fresh_page() -> Iterator[None]:
    """Nothing that an earlier test saw, and a monitor that listens on this machine alone."""
    before = streamlit_config.get_option("server.address")
    streamlit_config.set_option("server.address", "127.0.0.1")
    st.cache_resource.clear()
    st.cache_data.clear()
    yield
    streamlit_config.set_option("server.address", before)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as started:
        for name, value in started.settings_env().items():
            monkeypatch.setenv(name, value)
        yield started


class Page:
    """The page as a viewer sees it."""

    def __init__(self, tab: str = "Builds") -> None:
        self.app = AppTest.from_file(str(PAGE), default_timeout=30)
        self.app.session_state["tab"] = tab
        self.look()

    def look(self) -> str:
        """Draw it again; all of its text. It never shows a traceback."""
        st.cache_resource.clear()
        self.app.run()
        assert not self.app.exception, self.app.exception
        return self.text

    @property
    def text(self) -> str:
        kinds = ("markdown", "caption", "success", "warning", "error", "info", "code", "toast")
        found = [str(e.value) for kind in kinds for e in getattr(self.app, kind)]
        found += [str(button.label) for button in self.app.button]
        found += [f"{metric.label}: {metric.value}" for metric in self.app.metric]
        found += [str(e.proto.text) for e in self.app.get("progress")]
        found += [e.value.to_string() for e in self.app.dataframe]
        return "\n".join(found)

    def wait_for(self, *words: str) -> str:
        """Look until all of it is there."""
        seen = [""]

        def is_there() -> bool:
            seen[0] = self.look()
            return all(word in seen[0] for word in words)

        wait_until(is_there, f"{words} on the page", 60)
        return seen[0]

    def table(self, column: str) -> pd.DataFrame:
        """The table that has a column of that name."""
        (found,) = (e.value for e in self.app.dataframe if column in e.value.columns)
        return found

    def press(self, key: str) -> str:
        self.app.button(key=key).click().run()
        assert not self.app.exception, self.app.exception
        return self.text


def journal(run_id: str = "20260101-000000-aaaaaa", **record: Any) -> RunJournal:
    """A run that this process drives."""
    folder = runs_dir(config.resolve().data_dir)
    return RunJournal(folder, RunRecord(run_id, **{"index": "cats", **record}), {"call": 1})


def ended(state: RunState, n: int = 0, **record: Any) -> None:
    run = journal(f"20260101-{n:06d}-aaaaaa", **record)
    run.end(state, run.record.error)


def register(server: Server, *states: WorkerState) -> None:
    """Workers that say these states of themselves, as real ones do."""
    settings = config.resolve()
    keys = Keys(settings.namespace)
    with server.client(settings.redis_backend_db) as client:
        for n, state in enumerate(states):
            queues = () if state in (WorkerState.STARTING, WorkerState.REFUSED) else ("v1.abc",)
            is_dead, is_stale = state is WorkerState.DEAD, state is WorkerState.STALE
            info = WorkerInfo(
                id=f"w{n}",
                pid=n + 1,
                host="box",
                pool="solo",
                queues=queues,
                encoders={"abc": "test_vit"},
                ttl_s=0.05 if is_dead else 600,
            )
            said = WorkerState.READY if is_dead or is_stale else state
            work = WorkInfo(pid=n + 1, state=said, rate=5.0, run="r", batch=n)
            registry.announce(client, keys, info)
            ttl_s = 0.05 if is_dead or is_stale else 600
            registry.announce_work(client, keys, info.id, work, ttl_s)


def test_without_a_server_or_a_build_it_says_so_and_what_to_type() -> None:
    page = Page()

    text = page.wait_for("would use this machine alone", "toolkit cluster up")

    assert "Batches waiting: ?" in text
    assert "Workers busy: ?" in text
    assert "No build yet" in text
    assert "toolkit build FOLDER" in text


def test_a_live_build_shows_how_far_it_is_and_is_stopped_from_there() -> None:
    run = journal(batches={"workers": 3, "local": 2}, encoder="64-d of test_vit")
    run.record.accounting = Accounting(failed=7)
    run.record.state = RunState.RUNNING
    run.stage("embed", total=200)
    run.record.stage_started -= 10
    run.progress(80)
    run.write()

    page = Page()
    text = page.text
    stopped = page.press(f"stop_card_{run.record.run_id}")

    assert "embed 80 of 200" in text.replace("\\", "")
    assert "batches: 3 by workers, 2 local" in text.replace("\\", "")
    assert "7 failed" in text
    assert "Images/s: 8.0" in text
    assert "cats" in stopped
    assert run.is_cancelled
    run.end(RunState.CANCELLED)


def test_the_last_move_is_told_with_its_reason() -> None:
    move = {"at": time.time(), "to": "local", "reason": "all died", "eta_s": [60, 600]}
    run = journal(batches={"workers": 1, "local": 1}, moves=[{"to": "elsewhere"}, move])
    run.record.state = RunState.RUNNING
    run.write()

    text = Page().text.replace("\\", "")

    assert "s ago: no worker (all died); running locally, ETA 1 min 00 s → 10 min 00 s" in text
    assert "it moved, in words of another release" in text
    run.end(RunState.CANCELLED)


def test_a_build_that_ended_shows_its_books_and_what_failed() -> None:
    run = journal(accounting=Accounting(found=5, indexed=3, failed=2))
    rows = [
        {"path": f"/a/{n}.jpg", "kind": "decode", "reason": "cut off", "dataset": "d"}
        for n in range(2)
    ]
    run.failures(rows)
    run.end(RunState.DONE)

    page = Page()
    text = page.text.replace("\\", "")

    assert "No build is running" in text
    assert "found 5 = indexed 3 + duplicates 0 + failed 2" in text
    assert "2 failed" in text
    table = page.table("reason")
    assert list(table["path"]) == ["/a/0.jpg", "/a/1.jpg"]
    assert list(table["reason"]) == ["cut off", "cut off"]
    assert len(page.app.get("download_button")) == 1


def test_a_failed_file_that_can_be_seen_by_now_is_shown(tmp_path: Path) -> None:
    (tmp_path / "back.jpg").write_bytes(jpeg())
    run = journal()
    row = {"kind": "unreadable", "reason": "permission denied", "dataset": "d"}
    crash = {"kind": "crash", "reason": "killed a process", "dataset": "d"}
    path = str(tmp_path / "back.jpg")
    run.failures([{"path": path, **row}, {"path": path, **crash}])
    run.end(RunState.DONE)

    table = Page().table("reason")

    assert table["picture"][0].startswith("data:image/jpeg;base64,")
    # What killed a process is not decoded in the monitor's own.
    assert pd.isna(table["picture"][1])


def test_what_is_large_is_not_decoded_by_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large.jpg").write_bytes(jpeg(size=(200, 200)))
    monkeypatch.setenv("TOOLKIT_MAX_PIXELS", "10000")
    run = journal()
    row = {"kind": "decode", "reason": "over the limit", "dataset": "d"}
    run.failures([{"path": str(tmp_path / "large.jpg"), **row}])
    run.end(RunState.DONE)

    assert "picture" not in Page().table("reason").columns


def test_the_button_under_a_build_leads_to_what_failed_of_that_one() -> None:
    ended(RunState.DONE, 0, index="dogs")
    run = journal("20260102-000000-aaaaaa", accounting=Accounting(found=1, failed=1))
    run.failures([{"path": "/a/1.jpg", "kind": "decode", "reason": "cut off", "dataset": "d"}])
    run.end(RunState.DONE)
    page = Page("Workers")
    page.app.session_state["build"] = "20260101-000000-aaaaaa"

    page.press("failed_last_20260102-000000-aaaaaa")

    assert list(page.table("reason")["path"]) == ["/a/1.jpg"]


def test_a_build_that_failed_is_told_of_until_a_later_one_made_it_good() -> None:
    ended(RunState.FAILED, 0, index="dogs", error="no weights; type `toolkit model pull x`")
    ended(RunState.DONE, 1, index="cats")

    told = Page().text
    ended(RunState.DONE, 2, index="dogs")
    made_good = Page("Workers").text

    # The command can be copied as it is.
    assert "no weights; type `toolkit model pull x`" in told
    assert "no weights" not in made_good


def test_ten_thousand_failures_are_counted_and_shown_in_part() -> None:
    run = journal()
    row = {"kind": "decode", "reason": "cut off", "dataset": "d"}
    run.failures({"path": f"/a/{n}.jpg", **row} for n in range(10_000))
    run.end(RunState.DONE)

    page = Page()

    assert "10,000 failed" in page.text
    assert len(page.table("reason")) == 500


def test_a_held_build_can_be_published_with_its_losses_told() -> None:
    ended(RunState.HELD, losses=(12, 3))

    page = Page()

    assert "**12** images leave the index and **3** files newly fail" in page.text
    assert page.app.button(key="publish_full_20260101-000000-aaaaaa").label == "Publish"


def test_names_are_shown_as_they_are_and_never_read_as_markup() -> None:
    ended(RunState.FAILED, index=EVIL, error=EVIL, host=EVIL, encoder=EVIL)

    page = Page()
    texts = [str(e.value) for kind in ("markdown", "error") for e in getattr(page.app, kind)]

    shown = [text for text in texts if "alert" in text]
    assert len(shown) >= 4
    # One escape before each sign that means something.
    assert all(r"\<script\>alert\(1\)\</script\> \*a\* \$b\$ \[c\]" in text for text in shown)
    assert not any("material/close" in text for text in shown)


@pytest.mark.parametrize("text", ["a_b", "1. x", "# x", "| a |", "~~a~~", "\\", "a\nb", "😀"])
def test_plain_text_loses_nothing(text: str) -> None:
    escaped = plain(text)

    unescaped = escaped.replace("\\\\", "\0").replace("\\", "").replace("\0", "\\")
    assert unescaped == text.replace("\n", "\\n")


def test_workers_are_told_apart(server: Server) -> None:
    register(server, *WorkerState)

    page = Page("Workers")
    text = page.wait_for("1 dead", "1 stale")

    for words in ("1 busy", "1 idle", "1 starting", "1 refused", "Workers busy: 1 of 5"):
        assert words in text
    table = page.table("last beat").set_index("worker")
    assert list(table["state"]) == ["starting", "idle", "busy", "refused", "stale", "dead"]
    assert table.loc["w2", "doing"].startswith("batch 2 for")
    assert "silent for" in table.loc["w5", "doing"]


def test_a_server_that_dies_under_the_page_is_told_and_comes_back(server: Server) -> None:
    register(server, WorkerState.READY)
    page = Page("Queue")
    page.wait_for("1 idle", "Batches waiting: 0")

    server.kill()
    dead = page.wait_for("nobody knows who is there", "nothing listens")
    server.start()
    register(server, WorkerState.READY)
    alive = page.wait_for("1 idle")

    assert "Batches waiting: ?" in dead
    assert "Traceback" not in dead
    assert "Batches waiting: 0" in alive


def test_fifty_builds_and_fifty_workers_are_drawn_at_once(server: Server) -> None:
    register(server, *[WorkerState.BUSY] * 50)
    live = [journal(f"20260102-{n:06d}-aaaaaa", state=RunState.RUNNING) for n in range(10)]
    for n in range(45):
        ended(RunState.DONE, n)
    page = Page()  # the first one loads what it needs

    begun = time.monotonic()
    text = page.look()
    took_s = time.monotonic() - begun

    assert "50 busy" in text
    assert "and 6 more under Builds" in text
    assert "the newest 50 of 55" in text.replace("\\", "")
    assert took_s < 3
    for run in live:
        run.end(RunState.CANCELLED)


def test_dead_runs_are_purged_when_asked(server: Server) -> None:
    register(server, WorkerState.READY)
    settings = config.resolve()
    left = Keys(settings.namespace).run("gone") + ":leases"
    with server.client(settings.redis_backend_db) as client:
        client.hset(left, "1", "1")
        page = Page("Queue")

        text = page.press("purge_now")

        assert "0 batches of 1 dead runs were removed" in text
        assert not client.exists(left)


@pytest.mark.parametrize("address", ["0.0.0.0", ""])
def test_where_others_reach_it_nothing_can_be_changed(address: str) -> None:
    streamlit_config.set_option("server.address", address or None)
    run = journal(state=RunState.RUNNING)

    page = Page()
    before = page.text.replace("\\", "")
    text = page.press("start").replace("\\", "")

    assert "it is read-only; set TOOLKIT_MONITOR_TOKEN" in before
    assert "it is read-only; set TOOLKIT_MONITOR_TOKEN" in text
    assert [b.key for b in page.app.button] == ["start"]
    run.end(RunState.CANCELLED)


def test_with_a_token_only_who_knows_it_may_act(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_MONITOR_TOKEN", "open sesame")
    run = journal(state=RunState.RUNNING)
    stop, ask = f"stop_card_{run.record.run_id}", f"cancel_card_{run.record.run_id}_token"
    page = Page()

    before = [b.key for b in page.app.button]
    page.app.text_input(key=ask).input("guess").run()
    wrong = page.text, [b.key for b in page.app.button]
    page.app.text_input(key=ask).input("open sesame").run()

    assert stop not in before
    assert "That is not the token" in wrong[0]
    assert stop not in wrong[1]
    assert stop in [b.key for b in page.app.button]
    run.end(RunState.CANCELLED)


def test_settings_that_are_wrong_become_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6379")

    text = Page().text.replace("\\", "")

    assert "Kubernetes sets REDIS_PORT" in text


def test_a_log_is_shown_by_its_end(tmp_path: Path) -> None:
    run = journal()
    (run.folder / "run.log").write_text("".join(f"line {n}\n" for n in range(100_000)))
    run.end(RunState.DONE)

    text = Page("Logs").text

    assert "line 99999" in text
    assert "line 99799" not in text
    assert logs.tail(run.folder / "run.log").count("\n") == 199


def test_search_says_what_it_needs() -> None:
    assert "No index is published yet" in Page("Search").text


def test_flower_is_told_of() -> None:
    assert "Only there:" in Page("Flower").text


@pytest.mark.slow
def test_a_build_is_started_and_searched_from_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "few"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(jpeg(seed=n))
    page = Page()
    page.press("start")
    page.app.multiselect(key="start_datasets").select("few")
    # Streamlit's own test does not know that a form over the page stays open.
    page.press("start")
    page.app.button(key="start").click()
    page.press("start_now")

    page.wait_for("indexed 3")
    searching = Page("Search")
    searching.app.get("button_group")[0].set_value("a path").run()
    searching.app.text_input(key="search_path").input(str(folder / "1.jpg")).run()

    found = searching.text.replace("\\", "")
    streamlit_config.set_option("server.address", "0.0.0.0")
    searching.look()

    assert "3 nearest in few, exact" in found
    # Others are not told which files this machine has.
    assert not searching.app.text_input


@pytest.mark.slow
def test_a_held_build_is_published_from_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "few"
    folder.mkdir(parents=True)
    for n in range(6):
        (folder / f"{n}.jpg").write_bytes(jpeg(seed=n))
    build("few", name="few", distributed=False)
    (folder / "0.jpg").unlink()
    held = build("few", name="few", distributed=False)
    assert held.state is RunState.HELD
    page = Page()
    assert "**1** images leave the index" in page.text

    page.press(f"publish_trouble_{held.run_id}")

    page.wait_for("indexed 5", "No build is running")
    with tk.open_index("few") as index:
        assert len(index) == 5


def test_the_settings_of_the_file_and_of_the_launcher_are_the_same() -> None:
    written = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())

    flat = {f"{part}.{key}": v for part, keys in written.items() for key, v in keys.items()}

    assert flat == launch.OPTIONS


@pytest.mark.slow
@pytest.mark.parametrize("how", ["toolkit monitor", "streamlit run"])
def test_the_launcher_serves_this_machine_alone(how: str, tmp_path: Path) -> None:
    port = free_port()
    command = {
        "toolkit monitor": ["-m", "toolkit.cli", "monitor", "--port", str(port)],
        "streamlit run": [
            *("-m", "streamlit", "run", str(ROOT / "monitor_app.py")),
            *("--server.port", str(port)),
        ],
    }[how]
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/_stcore/health") == 200, "the page's server", 60)

        listening = {
            c.laddr.ip
            for c in psutil.Process(process.pid).net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
        loaded = Path(f"/proc/{process.pid}/maps").read_text()

        assert listening == {"127.0.0.1"}
        assert answers(url) == 200
        assert answers(f"{url}/api/health") == 200
        assert "libtorch" not in loaded
    finally:
        process.terminate()
        process.wait(timeout=20)
    assert "Traceback" not in log.read_text()


def test_a_port_that_is_taken_is_said() -> None:
    with Server() as taken:
        done = subprocess.run(
            [sys.executable, "-m", "toolkit.cli", "monitor", "--port", str(taken.plain_port)],
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert done.returncode == 2
    assert "choose another one with --port" in done.stderr


def answers(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return 0
