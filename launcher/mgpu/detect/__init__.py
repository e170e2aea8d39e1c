"""Drivers to `mgpu.rig.Rig`. Never runs at import, never writes `os.environ`, caches nothing."""
