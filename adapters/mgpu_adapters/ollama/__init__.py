"""Ollama: what its own scheduler will decide."""
