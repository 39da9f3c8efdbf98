"""The monitor: what is going on, in a browser and over HTTP. Law: no torch, and nobody waits."""
