"""Options that several commands take: those that say which encoder is meant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--checkpoint-path", help="Weights: a file, or a folder with model.safetensors."),
    click.option("--random-weights", is_flag=True, help="Random weights, for tests."),
    click.option(
        "--precision",
        default="fp32",
        type=click.Choice(["fp32", "bf16"]),
        show_default=True,
        help="Arithmetic of the model; bf16 is faster and moves the vectors.",
    ),
    click.option(
        "--decode",
        default="full",
        type=click.Choice(["full", "reduced"]),
        show_default=True,
        help="reduced: JPEGs at a half or less, where the model looks at no more.",
    ),
)


def with_encoder(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them; the command gets ``encoder``, arguments of ``EncoderRequest`` beside its model."""

    @functools.wraps(command)
    def called(
        *args: Any,
        checkpoint_path: str | None,
        random_weights: bool,
        precision: str,
        decode: str,
        **options: Any,
    ) -> Any:
        encoder = {
            "checkpoint_path": checkpoint_path,
            "pretrained": not random_weights,
            "precision": precision,
            "decode": decode,
        }
        return command(*args, encoder=encoder, **options)

    for option in reversed(_OPTIONS):
        called = option(called)
    return called
