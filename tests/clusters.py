"""Real workers to break, and what must be true when a build with them has ended.

One world for a module: a server, a data folder and settings whose intervals are scaled down,
so that the processes that take seconds to start are shared by tests which leave them whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import redis

import toolkit as tk
from tests.pictures import jpeg
from tests.sabotage import write_sabotage
from tests.servers import Server
from tests.support import CHEAP, CHEAP_FLAGS, table, wait_until
from toolkit import config
from toolkit.cluster import queues
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import WorkerView, list_workers
from toolkit.config import Settings
from toolkit.driver import Build

#: Intervals and limits scaled down: a beat that is missed three times is a death within 1 s.
SCALED = {
    "TOOLKIT_BEAT_S": "0.3",
    "TOOLKIT_BEAT_TTL_S": "1",
    "TOOLKIT_STALL_S": "3",
    "CELERY_TASK_TIME_LIMIT": "30",
    "CELERY_TASK_SOFT_TIME_LIMIT": "20",
    "TOOLKIT_THREADS": "1",
    "TOOLKIT_REQUIRE_WAIT_S": "2",
}

#: Carried by every process that a world starts, and by all that they start.
_MARK = "TESTS_WORLD"

#: Seconds that a worker may take to load its model on a machine that does other things too.
START_S = 60.0

ROOT = Path(__file__).parent.parent


class World:
    """A folder, a server and settings that builds and workers share; a context manager.

    Args:
        timings: Intervals and limits.
        **server: Settings of the server, as :class:`tests.servers.Server` takes them.
    """

    def __init__(self, timings: Mapping[str, str] = SCALED, **server: Any) -> None:
        self._timings = timings
        self.folder = Path(tempfile.mkdtemp(prefix="tkw-", dir="/tmp"))
        self.server = Server(**server).start()
        self.mark = secrets.token_hex(8)
        self.workers: list[Worker] = []
        write_sabotage(self.folder / "sabotage")
        self.datasets.mkdir()

    @property
    def datasets(self) -> Path:
        """Where the pictures are."""
        return self.folder / "datasets"

    @property
    def env(self) -> dict[str, str]:
        """What a client or a worker of this world has in its environment."""
        return {
            **self._timings,
            **self.server.settings_env(),
            # One for all tests of a module, so that they can share workers.
            "TOOLKIT_NAMESPACE": "world",
            "TOOLKIT_DATA_DIR": str(self.folder / "data"),
            "TOOLKIT_DATASETS_DIR": str(self.datasets),
            # Of all tests: no worker exports a model that another one has exported.
            "TOOLKIT_ENGINE_DIR": os.environ["TOOLKIT_ENGINE_DIR"],
            "PYTHONPATH": str(self.folder / "sabotage"),
            _MARK: self.mark,
        }

    @property
    def keys(self) -> Keys:
        """Of the namespace."""
        return Keys(self.settings.namespace)

    @property
    def settings(self) -> Settings:
        """Those of this moment."""
        return config.resolve()

    @contextlib.contextmanager
    def entered(self) -> Iterator[Self]:
        """Let this process be a client of this world, with nothing stored yet.

        The data folder stays in its place, so that the child that is kept warm serves the next
        test too; what settled the encoder stays as well.
        """
        for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
            (self.folder / "data" / name).unlink(missing_ok=True)
        for name in ("vectors", "indexes", "runs"):
            shutil.rmtree(self.folder / "data" / name, ignore_errors=True)
        before = {name: os.environ.get(name) for name in self.env}
        os.environ.update(self.env)
        try:
            yield self
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def worker(self, **given: Any) -> Worker:
        """Start a worker and wait until it is ready; it is stopped with this world."""
        return Worker(self, **given).start()

    def views(self, namespace: str | None = None) -> list[WorkerView]:
        """The workers that are registered."""
        settings = config.resolve(namespace=namespace)
        with self.server.client(settings.redis_backend_db) as client:
            return list_workers(client, Keys(settings.namespace))

    def claims(self, run_id: str) -> dict[int, str]:
        """Batches of a run → attempt and worker that took each."""
        with self.server.client(self.settings.redis_backend_db) as client:
            said: dict[bytes, bytes] = client.hgetall(self.keys.claims(run_id))  # type: ignore[assignment]
        return {int(batch): claim.decode() for batch, claim in said.items()}

    def claimed_by(self, run_id: str, worker: Worker) -> set[int]:
        """Batches of a run that a worker has in hand."""
        claims = self.claims(run_id).items()
        return {batch for batch, claim in claims if claim.partition("/")[2] == worker.id}

    def reference(self, datasets: str) -> list[tuple[Any, ...]]:
        """The table of an index that this process's own child made alone."""
        with self.entered():
            tk.build_index(datasets, name="reference", distributed=False, **CHEAP)
            return built("reference")

    def processes(self) -> list[psutil.Process]:
        """All that carry this world's mark, but for this process's own children."""
        ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        ours -= {pid for worker in self.workers for pid in worker.tree()}
        return [p for p in _marked(self.mark) if p.pid not in ours]

    def close(self) -> None:
        """Leave nothing behind."""
        for worker in self.workers:
            worker.reap()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.server.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Worker:
    """A worker in a session of its own.

    Args:
        world: Whose server and pictures it uses.
        pool: Celery's pool.
        plain: Start it with Celery's own command line, under no supervisor.
        env: What is different in its environment.
        prefix: Put before its command, such as ``("unshare", "-m")``.
        flags: Put behind its command.
        encoder: Flags, or for a plain one the fields, that name its encoder.
    """

    def __init__(
        self,
        world: World,
        *,
        pool: str = "prefork",
        plain: bool = False,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        flags: Sequence[str] = (),
        encoder: Mapping[str, Any] | None = None,
    ) -> None:
        self._world, self.pool, self.plain = world, pool, plain
        self._mark = secrets.token_hex(8)
        request = {**CHEAP, **(encoder or {})}
        self._env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("TOOLKIT_", "REDIS_"))},
            **world.env,
            "TOOLKIT_WORKER_ROOTS": str(world.folder),
            "TOOLKIT_WORKER_ENCODERS": json.dumps([request]),
            **(env or {}),
            "TESTS_WORKER": self._mark,
        }
        plainly = ("-m", "celery", "-A", "toolkit", "worker", f"--pool={pool}", "--loglevel=info")
        supervised = ("-m", "toolkit.cli", "worker", *CHEAP_FLAGS, "--pool", pool)
        command = plainly if plain or encoder else (*supervised, "--devices", "cpu")
        self._command = [*prefix, sys.executable, "-P", *command, *flags]
        self._process: subprocess.Popen[bytes] | None = None
        self.log_file = world.folder / f"worker-{len(world.workers)}.log"
        world.workers.append(self)

    def start(self, *, wait: bool = True) -> Self:
        """Start it, and wait for its ready line."""
        # `celery -A toolkit` looks for the package in its working directory.
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._env,
                cwd=ROOT,
                start_new_session=True,
            )
        if wait:
            self.wait_until_ready()
        return self

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_file.read_text(errors="replace")

    @property
    def id(self) -> str:
        """Its name in the registry, as of its last ready line."""
        return re.findall(r"toolkit worker (\S+) ready: ", self.log)[-1]

    @property
    def n_ready(self) -> int:
        """How many times it has become ready."""
        return self.log.count(" ready: ")

    def wait_until_ready(self, times: int = 1) -> None:
        """Wait until it has become ready so many times, and is listed."""

        def is_ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the worker ended: {self.log}"
            return self.n_ready >= times

        wait_until(is_ready, f"{times} ready lines in {self.log_file}", START_S)

    def wait_until_usable(self) -> None:
        """Wait until it is registered as ready, whatever was done to it or to the server."""

        def is_usable() -> bool:
            with contextlib.suppress(redis.RedisError, OSError):
                return any(v.id == self.id and v.state == "ready" for v in self._world.views())
            return False

        try:
            wait_until(is_usable, f"{self.id} in the registry", START_S)
        except AssertionError as error:
            views = [f"{view}: {view.state}, {view.reason}" for view in self._world.views()]
            end = self.log.splitlines()[-30:]
            error.add_note("\n".join(["registered:", *views, f"{self.log_file} ends:", *end]))
            raise

    def pid(self, which: str) -> int:
        """Number of its ``supervisor``, ``main``, ``pool`` process or embedding ``child``."""
        found = self.find(which)
        assert found is not None, f"{which} of the worker is not there: {self.log}"
        return found

    def find(self, which: str) -> int | None:
        """The same, ``None`` while there is none."""
        marks = {"main": "worker.main", "pool": "spawn_main", "child": "dispatch.child"}
        assert self._process is not None
        if which == "supervisor" or (which == "main" and self.is_unsupervised):
            return self._process.pid
        found = [p.pid for p in self.living() if marks[which] in " ".join(_command(p))]
        assert len(found) < 2, f"{len(found)} of {which}"
        return found[0] if found else None

    @property
    def is_unsupervised(self) -> bool:
        """Whether Celery's own process is what was started."""
        return "celery" in self._command

    def kill(self, which: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of its processes."""
        os.kill(self.pid(which), how)

    def send(self, pid: int, how: signal.Signals) -> None:
        """Send a signal to a process of it that may be gone by now."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)

    def kill_all(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all of its processes, the supervisor first."""
        for process in sorted(self.living(), key=lambda p: p.create_time()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)

    def stop(self) -> int:
        """End it as a service manager does; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=timeout_s)

    def living(self) -> list[psutil.Process]:
        """Its processes, wherever they ended up."""
        return _marked(self._mark, "TESTS_WORKER")

    def tree(self) -> list[int]:
        """Their numbers."""
        return [process.pid for process in self.living()]

    def reap(self) -> None:
        """Leave nothing of it behind."""
        self.kill_all(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(timeout=20)
        wait_until(lambda: not self.living(), "the end of a worker's processes", 20)


class Running:
    """A build that runs in a thread, while the test does something to the others."""

    def __init__(self, datasets: Any, **options: Any) -> None:
        self._ended: list[Build | BaseException] = []
        known = {run.run_id for run in tk.runs()}
        self._thread = threading.Thread(target=self._run, args=(datasets, options), daemon=True)
        self._thread.start()

        def new() -> list[str]:
            return [run.run_id for run in tk.runs() if run.run_id not in known]

        wait_until(lambda: bool(new() or self._ended), "the journal of a build", 20)
        self.run_id = new()[0]

    def _run(self, datasets: Any, options: dict[str, Any]) -> None:
        try:
            self._ended.append(tk.build_index(datasets, **{**CHEAP, **options}))
        except BaseException as error:
            self._ended.append(error)

    @property
    def build(self) -> Build:
        """The run, as its journal says."""
        return tk.attach(self.run_id)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return bool(self._ended)

    def until(self, condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
        """Wait on something that happens while it runs."""

        def happened() -> bool:
            true = condition()
            assert true or not self.is_over, f"the build ended before {what}: {self._ended}"
            return true

        wait_until(happened, what, deadline_s)

    def result(self, timeout_s: float = 120.0) -> Build:
        """Its end; raises what it raised."""
        self._thread.join(timeout=timeout_s)
        assert self._ended, f"the build did not end in {timeout_s:g} s: {self.build.logs()}"
        (end,) = self._ended
        if isinstance(end, BaseException):
            raise end
        return end


def write_slow(folder: Path, n: int, seed: int = 0) -> list[Path]:
    """Photos of which each takes 20 ms longer to decode."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo_{i:04d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(jpeg(seed=seed + i) + b"SLOW")
    return paths


def built(name: str) -> list[tuple[Any, ...]]:
    """The table of a published index."""
    with tk.open_index(name) as index:
        return table(index)


def assert_same_table(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    """Say in few words how two indexes differ, if they do."""
    assert [row[:-1] for row in found] == [row[:-1] for row in expected]
    vectors = [np.array([np.frombuffer(row[-1], "f4") for row in t]) for t in (found, expected)]
    worst = float(np.abs(vectors[0] - vectors[1]).max(initial=0.0))
    assert found == expected, f"vectors differ by up to {worst:g}"


def assert_books(run: Build) -> None:
    """The accounting adds up, and batches are counted to the road that did them."""
    books = run.accounting
    known = books.indexed + books.duplicates + books.failed + books.excluded
    assert (books.found, books.pending) == (known, 0)
    assert run.state == "done"


def assert_clean(world: World, *run_ids: str) -> None:
    """Nothing of these runs is on the server: no key, and soon no message that waits or is held."""
    settings = world.settings
    with (
        world.server.client(settings.redis_backend_db) as backend,
        world.server.client(settings.redis_broker_db) as broker,
    ):

        def messages() -> list[str]:
            return [m.id for m in queues.messages(broker, world.keys) if m.run_id in run_ids]

        for run_id in run_ids:
            assert list(backend.scan_iter(f"{world.keys.run(run_id)}*")) == []
        # A message may be nowhere but in the socket of a worker that was stopped, which enters it
        # among the held ones as it goes on, only to acknowledge it.
        wait_until(lambda: not messages(), "no message of the runs", 20)


def assert_empty(world: World) -> None:
    """No message is left at all, once the workers have acknowledged what they had."""

    def left() -> int:
        with world.server.client(world.settings.redis_broker_db) as broker:
            held = broker.hlen(f"{world.keys.prefix}unacked")
            return int(held) + sum(d.ready for d in queues.queues(broker, world.keys))  # type: ignore[arg-type]

    wait_until(lambda: left() == 0, "empty queues", 20)


def _marked(mark: str, variable: str = _MARK) -> list[psutil.Process]:
    wanted = f"{variable}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    process = psutil.Process(int(folder.name))
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
