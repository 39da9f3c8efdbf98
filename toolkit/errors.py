"""Every error this package raises; transport and work are different branches.

The tree::

    ToolkitError
    ├── UsageError                  the caller asked for something that cannot be
    │   ├── SettingError            a setting has a value that is not allowed
    │   │   └── UnknownSettingError
    │   ├── DatasetError            a dataset is missing, empty or named twice
    │   ├── ModelError              a model is unknown or its weights are not at hand
    │   │   └── WeightsNotFoundError
    │   ├── QueryError              a query that no index can answer
    │   │   └── EncoderMismatchError
    │   ├── IndexNotFoundError
    │   ├── IndexConflictError      the name is taken by other sources or another encoder
    │   └── RunNotFoundError
    ├── RunError                    a build ended without publishing what was asked
    │   ├── BuildInProgressError    the index is being built by another run
    │   ├── BuildFailedError
    │   ├── BuildHeldError          the guard refused to publish
    │   ├── RunCancelledError
    │   └── AccountingError         the books do not add up: a bug, never hidden
    ├── ClusterError                the cluster of this machine cannot be started or stopped
    ├── StorageError                the disk, or what is written on it
    │   ├── DiskFullError
    │   ├── FormatVersionError
    │   └── DamagedIndexError
    ├── ImageError                  one picture's fault, on every road
    │   ├── DecodeError             these bytes will never be a picture
    │   ├── UnreadableError         the file cannot be read now; tried again next time
    │   └── ChangedError            the file changed while it was read
    └── RoadError                   the transport's fault: the only branch that moves work
        ├── ExecutorDiedError
        ├── ExecutorStalledError
        ├── ExecutorUnavailableError
        ├── ServerError             the Redis server cannot be used; says in which way
        ├── WorkerLostError         a worker vanished with a batch, or the batch on its way
        └── AnswerError             a worker answered what cannot be believed

Each error passes its arguments to ``super().__init__``, so that it can cross a process
boundary, and keeps them as attributes.
"""

from __future__ import annotations


class ToolkitError(Exception):
    """Base of every error raised on purpose by this package."""


class UsageError(ToolkitError):
    """The call cannot be served as it was made; the message names the cure."""


class SettingError(UsageError):
    """A setting has a value that is not allowed.

    Attributes:
        name: The setting, as written where it was set.
        value: What was given.
        allowed: What would be accepted, in words.
        source: Where the value came from.
    """

    def __init__(self, name: str, value: object, allowed: str, source: str = "argument") -> None:
        super().__init__(name, value, allowed, source)
        self.name, self.value, self.allowed, self.source = name, value, allowed, source

    def __str__(self) -> str:
        return f"{self.name}={self.value!r} (from {self.source}) is not allowed; use {self.allowed}"


class UnknownSettingError(SettingError):
    """A setting that does not exist; ``allowed`` names what may have been meant."""

    def __str__(self) -> str:
        return f"there is no setting {self.name!r} (from {self.source}); use {self.allowed}"


class DatasetError(UsageError):
    """A dataset is missing, empty, or cannot be told from another one."""


class ModelError(UsageError):
    """A model is unknown, or cannot be made as it was asked for."""


class WeightsNotFoundError(ModelError):
    """No weights for a model are at hand.

    Attributes:
        model: The timm name.
        reason: What was tried and what it answered.
    """

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    def __str__(self) -> str:
        return (
            f"no weights at hand for {self.model!r} ({self.reason}); "
            f"fetch them once with `toolkit model pull {self.model}` on a machine that reaches "
            "the hub, give a folder or file with checkpoint_path= (--checkpoint-path), or ask for "
            "random weights with pretrained=False (--random-weights)"
        )


class QueryError(UsageError):
    """A query that no index can answer: wrong shape, not finite, not a picture."""


class EncoderMismatchError(QueryError):
    """Vectors of one encoder were put to an index of another.

    Attributes:
        index: Name of the index.
        expected: What the index holds, in words.
        given: What came, in words.
    """

    def __init__(self, index: str, expected: str, given: str) -> None:
        super().__init__(index, expected, given)
        self.index, self.expected, self.given = index, expected, given

    def __str__(self) -> str:
        return (
            f"index {self.index!r} holds {self.expected}, the query is {self.given}; "
            "embed the query with the index's own model, or rebuild the index"
        )


class IndexNotFoundError(UsageError):
    """No index of that name is published.

    Attributes:
        name: The name asked for.
        existing: The names there are.
    """

    def __init__(self, name: str, existing: tuple[str, ...] = ()) -> None:
        super().__init__(name, existing)
        self.name, self.existing = name, existing

    def __str__(self) -> str:
        if not self.existing:
            return f"no index {self.name!r}, nor any other yet; make one with `toolkit build`"
        shown = ", ".join(self.existing[:10]) + (", …" if len(self.existing) > 10 else "")
        return f"no index {self.name!r}; there are: {shown}"


class IndexConflictError(UsageError):
    """The index name is taken by other sources or by another encoder.

    Attributes:
        name: The index.
        reason: How the two differ.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return (
            f"index {self.name!r} exists and {self.reason}; "
            "choose another name=, or pass replace=True (--replace) to build it anew"
        )


class RunNotFoundError(UsageError):
    """No run with that id, or none that is live."""


class RunError(ToolkitError):
    """A build ended without publishing what was asked.

    Attributes:
        run_id: The run that tells more: ``toolkit runs``, ``toolkit logs RUN``.
    """

    def __init__(self, message: str, run_id: str = "") -> None:
        super().__init__(message, run_id)
        self.message, self.run_id = message, run_id

    def __str__(self) -> str:
        return self.message


class BuildInProgressError(RunError):
    """The index is being built by another run."""


class BuildFailedError(RunError):
    """Nothing was published; the index, if there was one, is as it was."""


class BuildHeldError(RunError):
    """The guard found a loss too large to publish unasked."""


class RunCancelledError(RunError):
    """Somebody cancelled the run; what was embedded is kept."""


class AccountingError(RunError):
    """found ≠ indexed + duplicates + failed + excluded + pending: a bug, never hidden."""


class ClusterError(ToolkitError):
    """The server or the workers of a local cluster cannot be started or stopped."""


class StorageError(ToolkitError):
    """Something on disk cannot be written, read, or understood."""


class DiskFullError(StorageError):
    """No space left; nothing published was touched.

    Attributes:
        path: Where the write was refused.
        needed_bytes: About what it takes, 0 when unknown.
        free_bytes: What is free there.
    """

    def __init__(self, path: str, needed_bytes: int = 0, free_bytes: int = 0) -> None:
        super().__init__(path, needed_bytes, free_bytes)
        self.path, self.needed_bytes, self.free_bytes = path, needed_bytes, free_bytes

    def __str__(self) -> str:
        need = f"about {self.needed_bytes / 1e6:.0f} MB are needed, " if self.needed_bytes else ""
        return (
            f"the disk is full at {self.path}: {need}{self.free_bytes / 1e6:.0f} MB are free; "
            "make room (`toolkit store du` shows where it went, `toolkit store gc` frees vectors "
            "that no index uses) or set TOOLKIT_DATA_DIR to a larger disk, then build again: "
            "what is stored is not embedded twice, and the published index is untouched"
        )


class FormatVersionError(StorageError):
    """The data folder was written by a newer release.

    Attributes:
        path: The file.
        found: Its format version.
        supported: The newest this release reads.
    """

    def __init__(self, path: str, found: int, supported: int) -> None:
        super().__init__(path, found, supported)
        self.path, self.found, self.supported = path, found, supported

    def __str__(self) -> str:
        return (
            f"{self.path} has format {self.found}, this release reads up to {self.supported}; "
            "upgrade the toolkit, or set TOOLKIT_DATA_DIR to another folder"
        )


class DamagedIndexError(StorageError):
    """A published index does not match its own manifest."""


class ImageError(ToolkitError):
    """One picture's fault; it fails on every road and stops nothing else."""


class DecodeError(ImageError):
    """These bytes will never be a picture under this recipe; remembered by content."""


class UnreadableError(ImageError):
    """The file cannot be read now: permission, I/O, vanished. Tried again next time."""


class ChangedError(ImageError):
    """The file changed while it was being read. Tried again next time."""


class RoadError(ToolkitError):
    """The transport failed, not the work: the only branch that may move work elsewhere."""


class ExecutorDiedError(RoadError):
    """The process that was embedding is gone."""


class ExecutorStalledError(RoadError):
    """The process that was embedding made no progress for too long."""


class ExecutorUnavailableError(RoadError):
    """No process that could embed can be had."""


class ServerError(RoadError):
    """The Redis server cannot be used.

    Attributes:
        address: Where it was looked for, without its password.
        cause: ``refused``, ``unknown-host``, ``unreachable``, ``timeout``, ``password``, ``tls``,
            ``database``, ``protected``, ``loading``, ``full``, ``read-only``, ``clients`` or
            ``other``.
        reason: What happened and the cure, in one sentence.
    """

    def __init__(self, address: str, cause: str, reason: str) -> None:
        super().__init__(address, cause, reason)
        self.address, self.cause, self.reason = address, cause, reason

    def __str__(self) -> str:
        return f"the Redis server at {self.address} cannot be used: {self.reason}"


class WorkerLostError(RoadError):
    """A worker vanished with a batch, or the batch was lost on its way to one."""


class AnswerError(RoadError):
    """A worker answered what cannot be believed: another encoder, shape, key or length."""
