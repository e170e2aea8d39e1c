"""mgpu: runs a local model on the right GPUs, and says why."""

__version__ = "0.1.0"
