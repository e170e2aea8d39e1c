"""Razer AIKit: vLLM in a container of its own, started by `docker run`."""
