"""The design that this project replaces: one base64 image per Celery task, with its result."""

from __future__ import annotations

import base64
import functools
import io
import os
from typing import Any

from celery import Celery
from PIL import Image

app = Celery(broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.update(task_time_limit=300, task_soft_time_limit=240)


@functools.cache
def _model() -> tuple[Any, Any]:
    import timm
    import torch

    torch.set_grad_enabled(False)
    net = timm.create_model(os.environ["MODEL"], pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_data_config({}, model=net)
    return net, timm.data.create_transform(**config, is_training=False)


@app.task(name="embed", max_retries=3)
def embed(data: str) -> list[float]:
    """One picture to one vector."""
    net, transform = _model()
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return list(net(transform(picture)[None]).numpy()[0].tolist())
