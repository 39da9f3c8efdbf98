"""The worker's end: what it does with a batch, how it is watched, started and kept alive."""
