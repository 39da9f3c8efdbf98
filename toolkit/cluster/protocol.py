"""The names on the server: queues, tasks and keys, all of them under one namespace.

Law: what two releases would understand differently is told apart by :data:`PROTOCOL`, which
is part of every queue's name, so that old and new workers never take each other's batches.

Broker database (written by Celery, prefix ``{namespace}:``)::

    v1.{fingerprint[:12]}           list   batches that wait, a queue for each encoder
    unacked, unacked_index          hash, sorted set   batches that a worker holds

Backend database::

    {namespace}:workers             hash   id → what a worker said last; also those that died
                                           {id}:work → what its process that embeds said last
    {namespace}:worker:{id}         text   the worker's process lives; expires
    {namespace}:worker:{id}:work    text   the process that embeds lives, and its state; expires
    {namespace}:worker:{id}:golden:{fingerprint[:12]}   blob   its vectors of the golden pictures
    {namespace}:run:{id}            text   the run lives: running or cancelled; expires
    {namespace}:run:{id}:leases     hash   batch → attempt that counts
    {namespace}:run:{id}:claims     hash   batch → attempt and worker that took it
    {namespace}:run:{id}:answers    list   what workers say, the oldest first
    {namespace}:run:{id}:vectors:{batch}:{attempt}      blob   float32 vectors; expires
    {namespace}:run:{id}:blob:{batch}:{item}            blob   bytes of a picture; expires
    {namespace}:runs                hash   run → what its journal said last
    {namespace}:cancel:{id}         text   somebody wants this run to stop; expires
    {namespace}:samples             list   the queues' last hour, for the monitor; expires
    {namespace}:samples:lock        text   a monitor has just added to it; expires
"""

from __future__ import annotations

import dataclasses

#: Counts up when messages, keys or answers change their meaning.
PROTOCOL = 1

#: The one Celery task.
EMBED_TASK = "toolkit.generate_embeddings_task"

#: Queue of a worker that does not know yet which encoder it will serve; nobody sends to it.
IDLE_QUEUE = f"v{PROTOCOL}.none"

#: In the environment of a worker: a JSON list of the encoders that it serves, for what
#: ``TOOLKIT_MODEL`` cannot say.
ENCODERS_VARIABLE = "TOOLKIT_WORKER_ENCODERS"

#: Seconds for which what belongs to a run stays on the server once its client is silent.
RUN_TTL_S = 60

#: Seconds for which a picture's bytes or a batch's vectors stay on the server.
BLOB_TTL_S = 900


def queue_name(fingerprint: str) -> str:
    """Queue of an encoder, without the namespace."""
    return f"v{PROTOCOL}.{fingerprint[:12]}"


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one namespace.

    Attributes:
        namespace: Two of them on one server never see each other.
    """

    namespace: str

    @property
    def prefix(self) -> str:
        """What every key begins with, Celery's as well."""
        return f"{self.namespace}:"

    @property
    def workers(self) -> str:
        """Hash of worker id to what it said last."""
        return f"{self.namespace}:workers"

    @property
    def runs(self) -> str:
        """Hash of run id to what its journal said last."""
        return f"{self.namespace}:runs"

    @property
    def samples(self) -> str:
        """List of what monitors saw of the queues over the last hour."""
        return f"{self.namespace}:samples"

    @property
    def samples_lock(self) -> str:
        """A monitor has just added to :attr:`samples`."""
        return f"{self.samples}:lock"

    def worker(self, worker_id: str) -> str:
        """A worker's process lives."""
        return f"{self.namespace}:worker:{worker_id}"

    def work(self, worker_id: str) -> str:
        """A worker's embedding process lives, and what it does."""
        return f"{self.worker(worker_id)}:work"

    def golden(self, worker_id: str, fingerprint: str) -> str:
        """A worker's vectors of the golden pictures."""
        return f"{self.worker(worker_id)}:golden:{fingerprint[:12]}"

    def run(self, run_id: str) -> str:
        """A run lives."""
        return f"{self.namespace}:run:{run_id}"

    def leases(self, run_id: str) -> str:
        """Hash of a run's batches in flight to the attempt that counts."""
        return f"{self.run(run_id)}:leases"

    def claims(self, run_id: str) -> str:
        """Hash of a run's batches in flight to the attempt and worker that took each."""
        return f"{self.run(run_id)}:claims"

    def answers(self, run_id: str) -> str:
        """List of what workers say to a run."""
        return f"{self.run(run_id)}:answers"

    def vectors(self, run_id: str, batch_id: int, attempt: int) -> str:
        """Vectors of one attempt at a batch."""
        return f"{self.run(run_id)}:vectors:{batch_id}:{attempt}"

    def blob(self, run_id: str, batch_id: int, item_id: int) -> str:
        """Bytes of a picture that the worker cannot read by its path."""
        return f"{self.run(run_id)}:blob:{batch_id}:{item_id}"

    def cancel(self, run_id: str) -> str:
        """Somebody wants a run to stop."""
        return f"{self.namespace}:cancel:{run_id}"
