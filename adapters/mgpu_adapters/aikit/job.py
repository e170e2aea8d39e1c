"""One model asked of Razer AIKit: as of vLLM, in a container."""

from __future__ import annotations

from mgpu.adapter import Command, Endpoint
from mgpu.plan import Layout
from mgpu.rig import Rig
from mgpu_adapters.aikit.container import build_container
from mgpu_adapters.vllm.job import VllmJob


class AIKitJob(VllmJob):
    """Implements `mgpu.adapter.Job`: vLLM's memory, checks and flags, with `docker run` around its command."""

    runtime = "aikit"

    def _command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        return build_container(self.need, layout, rig, endpoint, installed=self.installed, given=self.given)
