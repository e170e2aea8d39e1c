"""Exo: a cluster of machines (Macs, mostly) that runs MLX models over its own network. Attached to, never started."""
