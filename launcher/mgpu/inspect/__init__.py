"""Bytes on disk (or behind a URL) to `mgpu.model.Model`. Headers only."""
