"""The monitor as its users have it: started by its command, looked at in Chromium.

What the page says is held against what the server and the run's journal say at that time.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import toolkit as tk
from tests.clusters import Running, Worker, World, write_slow
from tests.pictures import write_photos
from tests.servers import free_port
from tests.support import wait_until
from toolkit.cluster import queues
from toolkit.journal import RunJournal
from toolkit.places import runs_dir
from toolkit.run_record import RunRecord, RunState

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium"),
]

#: The model that a build takes which names none: the verdict is about that one.
MODEL = {"model": "tf_efficientnet_lite0", "pretrained": True}

N_PHOTOS = 512

#: Seconds by which the page may lag behind; the bar is 2, and this machine does other things.
LAG_S = 6.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        write_slow(made.datasets / "photos", N_PHOTOS, seed=100)
        yield made


@pytest.fixture
def inside(world: World) -> Iterator[World]:
    with world.entered():
        yield world


@pytest.fixture(scope="module")
def workers(world: World) -> list[Worker]:
    """Two that stay whole."""
    both = [Worker(world, encoder=MODEL).start(wait=False) for _ in range(2)]
    for worker in both:
        worker.wait_until_ready()
    return both


class Monitor:
    """`streamlit run monitor_app.py`, and a tab of the browser on it."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.port, self.log = free_port(), folder / "monitor.log"
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "streamlit", "run", "monitor_app.py"]
        with open(self.log, "wb") as out:
            self._process = subprocess.Popen(
                [*command, f"--server.port={self.port}"], stdout=out, stderr=out, cwd=root
            )
        self._context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self._context.new_page()
        #: What a page must not do.
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.strangers: set[str] = set()
        self.page.on("dialog", self._on_dialog)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._on_request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _on_dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _on_request(self, request: Any) -> None:
        if not re.match(rf"(http|ws)://127\.0\.0\.1:{self.port}/|data:|blob:", request.url):
            self.strangers.add(request.url)

    def open(self) -> None:
        """Load the page, as soon as its server is there, and wait until it is drawn."""

        def answers() -> bool:
            assert self._process.poll() is None, self.log.read_text()
            with contextlib.suppress(sync_api.Error):
                self.page.goto(self.url)
                return True
            return False

        wait_until(answers, "the page's server", 60)
        self.page.get_by_text("Batches waiting").wait_for(timeout=60_000)

    @property
    def text(self) -> str:
        """All that can be read; what is in tables is drawn, and is not."""
        return str(self.page.locator("body").inner_text()).replace("\u2060", "")

    def figure(self, name: str) -> str:
        """One of the large figures."""
        metric = self.page.get_by_test_id("stMetric").filter(has_text=name)
        return str(metric.get_by_test_id("stMetricValue").inner_text()).strip()

    def wait_for(self, *words: str, deadline_s: float = 60.0) -> float:
        """Wait until all of it can be read; seconds that took."""
        begun = time.monotonic()
        while not all(word in self.text for word in words):
            assert time.monotonic() - begun < deadline_s, f"no {words} in {self.text}"
            self.page.wait_for_timeout(50)
        return time.monotonic() - begun

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def close(self) -> None:
        self._context.close()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=20)


@pytest.fixture
def monitor(browser: Any, inside: World, tmp_path: Path) -> Iterator[Monitor]:
    made = Monitor(browser, tmp_path)
    try:
        made.open()
        yield made
        assert "Traceback" not in made.text
        assert made.errors == []
        # Fonts, scripts and pictures are all our own.
        assert made.strangers == set()
        assert made.dialogs == []
    finally:
        made.close()
    assert "Traceback" not in made.log.read_text()


@dataclasses.dataclass(frozen=True)
class Truth:
    """What server and journal said at one time."""

    at: float
    done: int
    ready: int
    unacked: int
    busy: int


class Watched:
    """The truth over time, read in a thread straight from Redis and from the run's journal."""

    def __init__(self, world: World, run: Running) -> None:
        self._world, self._run = world, run
        self.seen: list[Truth] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        settings = self._world.settings
        with self._world.server.client(settings.redis_broker_db) as broker:
            while not self._is_over.wait(0.05):
                depths = queues.queues(broker, self._world.keys)
                self.seen.append(
                    Truth(
                        time.monotonic(),
                        self._run.build.record.done,
                        sum(depth.ready for depth in depths),
                        sum(depth.unacked for depth in depths),
                        sum(view.state == "busy" for view in self._world.views()),
                    )
                )

    def assert_lately(self, get: Callable[[Truth], int], shown: int) -> None:
        """What a page shows now was true within the last seconds.

        The page may have read before this thread did, and have read what lasted less than its beat.
        """
        since = time.monotonic() - LAG_S

        def was_true() -> bool:
            values = [get(truth) for truth in list(self.seen) if truth.at > since]
            return bool(values) and min(values) <= shown <= max(values)

        wait_until(was_true, f"the {shown} that is shown", LAG_S)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


def test_a_build_on_two_workers_is_shown_as_it_is(
    inside: World, workers: list[Worker], monitor: Monitor
) -> None:
    monitor.wait_for("a build with tf_efficientnet_lite0 uses the workers", "2 idle")
    run = Running("photos", name="photos", **MODEL)
    watched = Watched(inside, run)
    try:
        monitor.wait_for(f" of {N_PHOTOS}, ", deadline_s=60)
        looks = 0
        while not run.is_over and run.build.record.done < N_PHOTOS:
            monitor.page.wait_for_timeout(200)
            text = monitor.text
            said = re.search(rf"embed (\d+) of {N_PHOTOS}", text)
            figures = [monitor.figure(n) for n in ("Batches waiting", "Held by workers")]
            busy = re.match(r"(\d) of 2", monitor.figure("Workers busy"))
            if said is None:  # it has just ended
                break
            looks += 1
            watched.assert_lately(lambda truth: truth.done, int(said[1]))
            watched.assert_lately(lambda truth: truth.ready, int(figures[0]))
            watched.assert_lately(lambda truth: truth.unacked, int(figures[1]))
            assert busy is not None
            watched.assert_lately(lambda truth: truth.busy, int(busy[1]))
            assert re.search(r"\d+\.\d images/s, .* left", text)
        assert looks >= 3
        build = run.result()
        took = monitor.wait_for("No build is running", f"indexed {N_PHOTOS}")
    finally:
        watched.close()
    assert build.record.batches["local"] == 0
    assert took < LAG_S


def test_a_worker_that_is_killed_is_marked(inside: World, monitor: Monitor) -> None:
    worker = inside.worker()
    first, n_alive = worker.id, len(inside.views())
    monitor.wait_for(f"{n_alive} idle")

    worker.kill("main")

    # Three times the bar; the supervisor has started another one by then.
    monitor.wait_for("1 dead", f"worker {first}", "was killed by SIGKILL", deadline_s=36)
    monitor.wait_for(f"{n_alive} idle")
    worker.kill_all()
    monitor.wait_for("2 dead", f"worker {worker.id}", "has been silent for", deadline_s=36)


def test_a_server_that_dies_under_the_page_is_told_of_and_comes_back(
    inside: World, monitor: Monitor
) -> None:
    monitor.wait_for("Batches waiting")
    wait_until(lambda: monitor.figure("Batches waiting") == "0", "a figure", 20)

    inside.server.kill()
    told_s = monitor.wait_for("would use this machine alone", "nothing listens there")
    shown = monitor.text
    inside.server.start()
    begun = time.monotonic()

    def is_back() -> bool:
        monitor.page.wait_for_timeout(50)
        return monitor.figure("Batches waiting") == "0"

    wait_until(is_back, "the figures to come back", 30)
    assert "Traceback" not in shown
    assert told_s < 15
    assert time.monotonic() - begun < 15


def test_a_build_is_started_cancelled_and_its_end_shown(inside: World, monitor: Monitor) -> None:
    page = monitor.page
    page.get_by_role("button", name="Start a build").click()
    page.get_by_text("It goes on when this page").wait_for()
    page.get_by_role("combobox", name="Datasets").click()
    page.get_by_role("option", name="photos").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Start", exact=True).click()
    monitor.wait_for("Cancel…", deadline_s=90)

    page.get_by_text("Cancel…").first.click()
    page.get_by_role("button", name="Stop this build").click()

    monitor.wait_for("No build is running", "cancelled")
    (run,) = tk.runs()
    assert run.state == "cancelled"


def test_names_are_read_as_they_are(inside: World, monitor: Monitor) -> None:
    name = "<b>a</b> -> b -- c :smile: :material/close: *d* >= $e$ `f`"
    record = RunRecord("20260101-000000-aaaaaa", name, encoder=name, host=name)
    run = RunJournal(runs_dir(inside.settings.data_dir), record, {})

    run.end(RunState.FAILED, name)

    monitor.wait_for(name)


def test_a_picture_is_searched_and_failures_are_downloaded(
    inside: World, monitor: Monitor, tmp_path: Path
) -> None:
    folder = inside.datasets / "few"
    photos = write_photos(folder, 5, seed=3)
    (folder / "no picture.jpg").write_text("a text")
    (folder / "<img src=x onerror=alert(1)>.jpg").write_bytes(b"neither")
    tk.build_index("few", name="few", distributed=False, model="test_vit", pretrained=False)
    page = monitor.page

    monitor.tab("Search")
    page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(photos[2])
    monitor.wait_for("5 nearest in few", os.path.basename(photos[2]), "1 · 1.000", deadline_s=90)

    monitor.tab("Builds")
    with page.expect_download() as download:
        page.get_by_role("button", name="All failures as CSV").click()
    target = tmp_path / "failures.csv"
    download.value.save_as(target)
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {os.path.basename(row["path"]) for row in rows} == {
        "no picture.jpg",
        "<img src=x onerror=alert(1)>.jpg",
    }
    assert all(row["reason"] for row in rows)
