"""Rig profiles: TOML to and from `mgpu.rig.Rig`, the bundled rigs, and what cards are known to have."""
