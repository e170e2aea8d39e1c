"""Which of Exo's placements is taken, and what its refusals mean.

Source: exo 0.3.70 (b5375f8, 2026-06-22) `src/exo/master/placement.py`, `placement_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from mgpu.errors import DoesNotFitError, MgpuError, RuntimeFailedError
from mgpu_adapters.exo.state import Instance, Preview

_MORE_ROOM: Final = "free memory on the nodes, add a node, or give a smaller quantisation"
_OTHER_SPLIT: Final = "leave --split out, and Exo takes the fewest nodes that hold the model"

#: What Exo says where no set of nodes has the memory; "Insufficient" comes from `create_instance`.
_NO_MEMORY: Final = ("sufficient memory", "nsufficient memory")


class Wish(Struct, frozen=True, kw_only=True):
    """How the model is to be placed: on how many nodes, and which sharding; empty: what is best."""

    model_id: str
    sharding: str = ""  # "Pipeline" or "Tensor"
    min_nodes: int = 1
    max_nodes: int | None = None

    def allows(self, n_nodes: int, sharding: str) -> bool:
        """One node is always "Pipeline" to Exo."""
        if n_nodes < self.min_nodes or (self.max_nodes is not None and n_nodes > self.max_nodes):
            return False
        return self.sharding in {"", sharding}

    def allows_instance(self, instance: Instance) -> bool:
        """Whether one that is there already would do."""
        assignments = instance.shard_assignments
        kinds = {kind.removesuffix("ShardMetadata") for shard in assignments.runner_to_shard.values() for kind in shard}
        return any(self.allows(len(assignments.node_to_runner), kind) for kind in kinds)


def best_placement(previews: Iterable[Preview], wish: Wish) -> Preview | None:
    """The fewest nodes; on several, tensor ranks over RDMA where there is any, else a pipeline over sockets.

    Exo's own figures have tensor ranks ahead over RDMA alone (README: 1.8x on 2 nodes, 3.2x on 4, Thunderbolt 5).
    """
    placed = [preview for preview in previews if preview.error is None and preview.placed is not None]
    allowed = [preview for preview in placed if wish.allows(preview.n_nodes, preview.sharding)]
    return min(allowed, key=lambda one: (one.n_nodes, *_preference(one)), default=None)


def mode_words(preview: Preview) -> str:
    """`"pipeline over sockets"`, to follow a number of nodes; empty for one."""
    if preview.n_nodes == 1:
        return ""
    over = "RDMA" if _is_rdma(preview) else "sockets"
    return f", {'tensor ranks' if preview.sharding == 'Tensor' else 'pipeline'} over {over}"


def unplaceable(previews: Iterable[Preview], wish: Wish) -> MgpuError:
    """Why there is no placement as wished, in Exo's own words."""
    previews = tuple(previews)
    if not previews:
        return RuntimeFailedError("the Exo cluster has no node to place a model on", hint="see its dashboard")
    asked = [preview for preview in previews if wish.sharding in {"", preview.sharding}]
    reasons = list(dict.fromkeys(preview.error for preview in asked or previews if preview.error))
    if not reasons:
        sizes = sorted({preview.n_nodes for preview in previews})
        return RuntimeFailedError(
            f"Exo places {wish.model_id} on {' or '.join(map(str, sizes))} nodes, and not as --split asks",
            hint=_OTHER_SPLIT,
        )
    return refused(wish.model_id, reasons[0])


def refused(model_id: str, reason: str) -> MgpuError:
    """The error for `reason`, which is Exo's."""
    kind = DoesNotFitError if any(words in reason for words in _NO_MEMORY) else RuntimeFailedError
    hint = _MORE_ROOM if kind is DoesNotFitError else _OTHER_SPLIT
    return kind(f"Exo cannot place {model_id}: {reason.rstrip('.')}", hint=hint)


def _preference(preview: Preview) -> tuple[bool, bool]:
    rdma = _is_rdma(preview)
    return not rdma, (preview.sharding == "Tensor") != rdma


def _is_rdma(preview: Preview) -> bool:
    return preview.instance_meta == "MlxJaccl"
