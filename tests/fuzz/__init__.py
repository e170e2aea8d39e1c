"""Hostile input for every parser: `python -m fuzz --help`, from tests/. What is fuzzed and found: docs/fuzzing.md."""
