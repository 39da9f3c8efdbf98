"""What is being looked at: a server, an encoder and settings; and the commands that mend it."""

from __future__ import annotations

import dataclasses
import shlex
import socket

from toolkit import config
from toolkit.cluster.connection import Address, own_address
from toolkit.cluster.protocol import Keys, queue_name
from toolkit.cluster.registry import WorkerView
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest, EncoderSpec

#: Settings that a worker must share with its clients, or they never meet.
_SHARED = ("redis_url", "redis_host", "redis_port", "redis_broker_db", "redis_backend_db",
           "namespace", "celery_task_time_limit")  # fmt: skip

#: Where settings come from that a command typed into a terminal does not see.
_UNSEEN = ("tk.configure", "argument")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What the checks on the way to the workers are about.

    Attributes:
        settings: Of whoever asks.
        request: The encoder.
        address: The server.
        spec: What the encoder came to; ``None`` while it was never loaded on this machine.
    """

    settings: Settings
    request: EncoderRequest
    address: Address
    spec: EncoderSpec | None

    @property
    def keys(self) -> Keys:
        """The names on the server."""
        return Keys(self.settings.namespace)

    @property
    def queue(self) -> str | None:
        """The encoder's queue, if it is known."""
        return queue_name(self.spec.fingerprint) if self.spec else None

    @property
    def start(self) -> str:
        """The command that starts a worker for this encoder at this server."""
        own = own_address(self.settings)
        if own is not None and own.url == self.address.url:
            return f"{self._unseen}toolkit cluster up {encoder_flags(self.request)}"
        return f"{self._unseen}toolkit worker {encoder_flags(self.request)}"

    def restart(self, view: WorkerView) -> str:
        """The command that ends a worker and has another one in its place."""
        end = on_its_host(view, f"kill {view.pid}")
        # One with a supervisor is started again by that.
        return end if view.info.supervised else f"{end}; {self.start}"

    @property
    def _unseen(self) -> str:
        """What a terminal must be told that this process was told by a call."""
        sources = self.settings.sources
        told = {
            name.upper().replace("NAMESPACE", "TOOLKIT_NAMESPACE"): config.shown(
                self.settings, name
            )
            for name in _SHARED
            if sources.get(name) in _UNSEEN
        }
        return "".join(f"{name}={shlex.quote(value)} " for name, value in told.items())


def encoder_flags(request: EncoderRequest) -> str:
    """What names an encoder on the command line."""
    words = ["--model", request.model]
    if request.checkpoint_path is not None:
        words += ["--checkpoint-path", request.checkpoint_path]
    elif not request.pretrained:
        words.append("--random-weights")
    return shlex.join(words)


def on_its_host(view: WorkerView, command: str) -> str:
    """A command as it is typed here for a worker that may be on another machine."""
    if view.host in ("", socket.gethostname()):
        return command
    return f"ssh {view.host} {shlex.quote(command)}"


def variables(**values: object) -> str:
    """The command that sets variables in a terminal; a password is written as a word."""
    return " ".join(["export", *(f"{name}={value}" for name, value in values.items())])
