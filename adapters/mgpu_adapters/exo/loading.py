"""How far an instance is, look by look, and when there is nothing more to wait for."""

from __future__ import annotations

from typing import Final

from mgpu.errors import RuntimeFailedError
from mgpu.service import Told
from mgpu_adapters.exo.state import Instance, Runner, State

#: Seconds between two looks at the cluster.
LOOK_S: Final = 0.5
#: Seconds for an instance to appear, and without any change of one that loads.
_APPEARS_S: Final = 60
_STALLS_S: Final = 600
#: Seconds for which something may have failed: Exo itself tries an instance again, some times (`worker/main.py`).
_FAILED_S: Final = 8


class Loading:
    """One instance on its way up. `ready` once every runner is."""

    def __init__(self, model_id: str, instance_id: str) -> None:
        self._model_id = model_id
        self._instance_id = instance_id
        self._missing = self._still = self._failed = 0
        self._last: Told | None = None
        self._failure = ""
        self.ready = False

    def look(self, state: State) -> Told:
        """What to show now. Raises `RuntimeFailedError` when it has vanished, failed for good, or stands still."""
        instance = state.instance(self._instance_id)
        if instance is None:
            self._missing += 1
            if self._last is not None or self._missing * LOOK_S > _APPEARS_S:
                raise self._vanished()
            return Told(text="waiting for the cluster to take it up")
        runners = state.runners_of(instance)
        self.ready = bool(runners) and all(runner.is_up for runner in runners.values())
        if self.ready:
            return Told(text=f"on {placed_words(state, instance)}", stays=True)
        told = _progress(state, instance, runners)
        self._still = self._still + 1 if told == self._last else 0
        self._last = told
        self._give_up(state.failure(instance) or state.download_error(instance) or "", told)
        return told

    def _give_up(self, failure: str, told: Told) -> None:
        self._failed = self._failed + 1 if failure else 0
        self._failure = failure or self._failure
        if self._failed * LOOK_S > _FAILED_S:
            raise RuntimeFailedError(
                f"Exo does not bring {self._model_id} up: {failure}", hint="see the log of that node"
            )
        if self._still * LOOK_S > _STALLS_S:
            raise RuntimeFailedError(
                f"Exo has not come further with {self._model_id} for {_STALLS_S} s: {told.text}",
                hint="see the logs of its nodes",
            )

    def _vanished(self) -> RuntimeFailedError:
        if self._last is None:
            return RuntimeFailedError(
                f"Exo took the request to run {self._model_id}, and made no instance of it in {_APPEARS_S} s",
                hint="see the log of its master: it refuses there what no longer fits",
            )
        cause = f": {self._failure}" if self._failure else ""
        return RuntimeFailedError(
            f"Exo gave up {self._model_id} while it was loading{cause}", hint="see the logs of its nodes"
        )


def placed_words(state: State, instance: Instance) -> str:
    """`"studio (layers 0-23) + mini (layers 24-31)"`; of tensor ranks, and of one node, the names alone."""
    assignments = instance.shard_assignments
    parts = []
    for node, runner in assignments.node_to_runner.items():
        kind, shard = next(iter(assignments.runner_to_shard.get(runner, {}).items()), ("", None))
        split = len(assignments.node_to_runner) > 1 and kind.startswith("Pipeline")
        layers = f" (layers {shard.start_layer}-{shard.end_layer - 1})" if shard is not None and split else ""
        start = shard.start_layer if shard is not None else 0
        parts.append((start, f"{state.name_of(node)}{layers}"))
    return " + ".join(words for _, words in sorted(parts))


def _progress(state: State, instance: Instance, runners: dict[str, Runner]) -> Told:
    download = state.download(instance)
    if download is not None:
        total, done = download.total.in_bytes, download.downloaded.in_bytes
        return Told(text="its nodes download the model", done=done, total=total)
    words = [f"{state.name_of(node)}: {runner.words}" for node, runner in runners.items() if not runner.is_up]
    return Told(text=", ".join(words) or "waiting for runners")
