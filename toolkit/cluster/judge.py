"""Whether a worker can serve an encoder, and if not, why and what mends it. Pure: no server."""

from __future__ import annotations

from toolkit.cluster.protocol import PROTOCOL, queue_name
from toolkit.cluster.registry import WorkerState, WorkerView, WorkInfo


def judge(
    view: WorkerView,
    fingerprint: str,
    model: str,
    *,
    visibility_timeout_s: float,
    protocol: int = PROTOCOL,
) -> str | None:
    """Why a worker cannot serve an encoder, with the cure; ``None`` if it can.

    Args:
        view: The worker.
        fingerprint: Of the encoder.
        model: timm name of the encoder.
        visibility_timeout_s: This client's.
        protocol: This client's.
    """
    info, queue = view.info, queue_name(fingerprint)
    # One that starts, or cannot, does not know its encoders yet.
    is_settled = bool(info.encoders)
    if not view.is_alive:
        return _not_ready(view)
    if info.protocol != protocol:
        return (
            f"{view} speaks protocol {info.protocol} (release {info.version or 'unknown'}), this "
            f"client {protocol}; install the same release of image-index-toolkit on both"
        )
    if is_settled and fingerprint not in info.encoders:
        return _other_encoder(view, fingerprint, model)
    if is_settled and queue not in info.queues:
        return (
            f"{view} consumes {', '.join(info.queues) or 'no queue'}, not {queue}; start it "
            "without -Q: it knows its queues by itself"
        )
    if info.visibility_timeout_s != visibility_timeout_s:
        return (
            f"{view} has a visibility timeout of {info.visibility_timeout_s:g} s, this client "
            f"{visibility_timeout_s:g} s; give both the same CELERY_TASK_TIME_LIMIT"
        )
    return _not_ready(view)


def _other_encoder(view: WorkerView, fingerprint: str, model: str) -> str:
    theirs = [known for known, name in view.info.encoders.items() if name == model]
    if theirs:
        return (
            f"{view} serves {model} with other weights, preprocessing or precision (its encoder is "
            f"{theirs[0][:12]}, this one {fingerprint[:12]}); give it the same weights, options "
            "and release, then restart it"
        )
    served = ", ".join(view.info.encoders.values()) or "no encoder"
    return f"{view} serves {served}, not {model}; start one with `toolkit worker --model {model}`"


def _not_ready(view: WorkerView) -> str | None:
    work = view.work or WorkInfo()
    if view.state is WorkerState.DEAD and view.info.ended:
        return f"{view} {view.info.ended}; its supervisor starts another one"
    held = f" over batch {work.batch} of run {work.run}" if work.run else ""
    sentences = {
        WorkerState.DEAD: f"{view} has been silent for {view.beat_age_s:.0f} s: it was killed, or "
        "its machine or network is down; start one with `toolkit worker`",
        WorkerState.STARTING: f"{view} has been starting for {view.info.started_s:.0f} s and "
        f"waits for {view.reason or 'its model to be loaded'}",
        WorkerState.REFUSED: f"{view} refuses to work: {view.reason or 'it does not say why'}",
        WorkerState.STALE: f"the embedding process of {view} fell silent{held}: it hangs or was "
        f"killed; stop the worker with `kill {view.pid}` and start one with `toolkit worker`",
    }
    return sentences.get(view.state)
