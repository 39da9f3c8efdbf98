"""The command line: parse, call, print, exit code."""

# The commands register themselves with the one that they belong to.
from toolkit.cli import builds, data, doctor, monitor, verify, workers
from toolkit.cli.main import main

__all__ = ["builds", "data", "doctor", "main", "monitor", "verify", "workers"]
