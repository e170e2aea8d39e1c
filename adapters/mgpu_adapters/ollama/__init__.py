"""Ollama: what its own scheduler would decide, and how a server is held to a plan."""
