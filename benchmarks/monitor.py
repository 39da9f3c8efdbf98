"""How soon the monitor's page says what is true, and what a viewer of it costs.

A server, two workers, a build of the sample photos, `toolkit monitor` and Chromium (Debian:
``apt install chromium``; Python's ``playwright``). Measured: how far the page lags behind the
run's journal, how soon a killed worker is marked, how soon a killed server is told of and its
return is, the first paint with 50 builds and 50 workers, and the processor time that one viewer
costs. Run it on a quiet machine::

    python benchmarks/monitor.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from common import Kind, photos_of
from playwright.sync_api import Browser, Page, sync_playwright

import toolkit as tk
from toolkit import config
from toolkit.cluster import registry
from toolkit.cluster.connection import connect, resolve_address
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerInfo, WorkerState, WorkInfo
from toolkit.cluster.server import find_binary
from toolkit.journal import RunJournal
from toolkit.places import runs_dir
from toolkit.run_record import RunRecord, RunState

#: Builds and workers of the first paint.
MANY = 50

#: Seconds over which processor time is measured.
WATCHED_S = 30.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="monitor-")))
        redis_port, port = free_port(), free_port()
        os.environ["REDIS_PORT"], os.environ["TOOLKIT_DATA_DIR"] = str(redis_port), str(folder)
        os.environ["TOOLKIT_DATASETS_DIR"], os.environ["TOOLKIT_THREADS"] = str(folder), "1"
        # So many that the build lasts while the page is watched.
        photos = folder / "photos"
        photos_of(Kind("640x480", (640, 480)), photos, 3000)
        server = stack.enter_context(started(folder, *server_command(redis_port)))
        workers = [stack.enter_context(started(folder, *toolkit("worker"))) for _ in range(2)]
        monitor = stack.enter_context(started(folder, *toolkit("monitor", f"--port={port}")))
        chromium = shutil.which("chromium")
        browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=chromium)
        stack.callback(browser.close)
        url = f"http://127.0.0.1:{port}"
        page = opened(browser, url)
        until(page, lambda text: "2 idle" in text, 120)

        lags = lag_of_a_build(page, photos)
        show("the page behind the journal", lags)
        show("a killed worker is marked", [killed(page, workers[0])])
        told, back = server_away(page, server, lambda: server_command(redis_port), folder, stack)
        show("a killed server is told of", [told])
        show("its return is told of", [back])
        page.close()
        idle = cpu_share(monitor)
        page = opened(browser, url)
        show("one viewer", [100 * (cpu_share(monitor, page) - idle)], "% of a core")
        page.close()
        crowd()
        show(f"first paint, {MANY} builds and {MANY} workers", first_paints(browser, url, repeats))


def toolkit(*words: str) -> list[str]:
    """A command of the toolkit."""
    return [sys.executable, "-m", "toolkit.cli", *words]


def server_command(port: int) -> list[str]:
    """A server that keeps nothing."""
    return [str(find_binary()), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]


@contextlib.contextmanager
def started(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with all that it started."""
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            psutil.wait_procs(children, timeout=30)
        process.wait()


def opened(browser: Browser, url: str) -> Page:
    """The page, drawn."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            page.goto(url)
            break
    page.get_by_text("Batches waiting").wait_for()
    return page


def until(page: Page, is_there: Callable[[str], Any], deadline_s: float) -> float:
    """Seconds until something can be read on the page."""
    begun = time.monotonic()
    while not is_there(text := page.locator("body").inner_text()):
        if time.monotonic() - begun > deadline_s:
            raise SystemExit(f"waited {deadline_s:g} s in vain; the page says: {text}")
        page.wait_for_timeout(20)
    return time.monotonic() - begun


def lag_of_a_build(page: Page, photos: Path) -> list[float]:
    """Seconds from each count in the journal until the page has it."""
    run = tk.build_index(photos, name="photos", wait=False)
    reached: dict[int, float] = {}
    lags: dict[int, float] = {}
    while run.state.is_live:
        record = run.record
        if record.stage == "embed":
            reached.setdefault(record.done, time.monotonic())
        said = re.search(r"embed ([\d,]+) of", page.locator("body").inner_text())
        if said and (n := int(said[1].replace(",", ""))) in reached:
            lags.setdefault(n, time.monotonic() - reached[n])
        page.wait_for_timeout(20)
    return list(lags.values())


def killed(page: Page, worker: subprocess.Popen[bytes]) -> float:
    """Seconds until a worker that was killed, with its supervisor, is marked as dead."""
    for process in [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return until(page, lambda text: "1 dead" in text, 60)


def server_away(
    page: Page,
    server: subprocess.Popen[bytes],
    command: Callable[[], list[str]],
    folder: Path,
    stack: contextlib.ExitStack,
) -> tuple[float, float]:
    """Seconds until a killed server, and then its return, is told of."""
    server.send_signal(signal.SIGKILL)
    told = until(
        page,
        lambda text: "nothing listens there" in text and re.search(r"Batches waiting\s+\?", text),
        60,
    )
    stack.enter_context(started(folder, *command()))
    return told, until(page, lambda text: re.search(r"Batches waiting\s+\d", text), 60)


def cpu_share(monitor: subprocess.Popen[bytes], page: Page | None = None) -> float:
    """Processor seconds a second, of the monitor and all that it started."""
    before, begun = cpu_s(monitor), time.monotonic()
    if page is not None:
        page.wait_for_timeout(1000 * WATCHED_S)
    else:
        time.sleep(WATCHED_S)  # what is measured is the passing of time
    return (cpu_s(monitor) - before) / (time.monotonic() - begun)


def cpu_s(monitor: subprocess.Popen[bytes]) -> float:
    """Processor seconds so far."""
    process = psutil.Process(monitor.pid)
    return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])


def crowd() -> None:
    """Register workers and write builds, as many as are shown."""
    settings = config.resolve()
    keys = Keys(settings.namespace)
    with connect(resolve_address(settings)) as client:
        for n in range(MANY):
            info = WorkerInfo(
                id=f"w{n}", pid=n, host="box", pool="solo", queues=("v1.a",), ttl_s=3600
            )
            registry.announce(client, keys, info)
            work = WorkInfo(pid=n, state=WorkerState.BUSY, rate=5.0, run="r", batch=n)
            registry.announce_work(client, keys, info.id, work, 3600)
    for n in range(MANY):
        run = RunJournal(
            runs_dir(settings.data_dir), RunRecord(f"20260101-{n:06d}-aaaaaa", f"index {n}"), {}
        )
        run.end(RunState.DONE)


def first_paints(browser: Browser, url: str, repeats: int) -> list[float]:
    """Seconds from the address to a page with every figure on it."""
    took = []
    for _ in range(repeats):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        begun = time.monotonic()
        page.goto(url)
        until(page, lambda text: f"{MANY} busy" in text and "One build" in text, 60)
        took.append(time.monotonic() - begun)
        page.close()
    return took


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def show(what: str, values: list[float], unit: str = "s") -> None:
    """One row: median and worst."""
    median, worst = statistics.median(values), max(values)
    print(f"{what:<45} {median:6.2f} {unit} (worst of {len(values)}: {worst:.2f})", flush=True)


if __name__ == "__main__":
    main()
