"""A model on an Exo cluster: placed, awaited, proven by a token, and deleted again. Conversations without I/O.

Endpoints and their behaviour: exo 0.3.70 (b5375f8, 2026-06-22) `src/exo/api/main.py`, `src/exo/worker/`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final, Literal, TypeVar
from urllib.parse import quote, urlencode

from mgpu.errors import BadModelError, RuntimeFailedError
from mgpu.service import Answer, Call, Digest, More, Pause, Said, Space, Talk, Told
from mgpu_adapters.exo.answers import body_of, has_error, has_token, reason
from mgpu_adapters.exo.loading import LOOK_S, Loading
from mgpu_adapters.exo.placing import Wish, best_placement, mode_words, refused, unplaceable
from mgpu_adapters.exo.state import Previews, State

T = TypeVar("T")
_Method = Literal["GET", "POST", "DELETE"]
Part = Generator[Call | More | Digest | Space | Told | Pause | Said, "Answer | None", T]

#: Seconds until a deleted instance must have gone.
_GOES_S: Final = 15
_FIRST_TOKEN_S: Final = 600.0
_OK: Final = 200


class ExoAttachment:
    """Implements `mgpu.adapter.Attachment`. `instance_id`: of the instance that is ours to delete, once asked for."""

    def __init__(self, url: str, wish: Wish) -> None:
        self._url = url.rstrip("/")
        self._wish = wish
        self._used = ""
        self.instance_id: str | None = None

    @property
    def endpoint(self) -> str:
        return f"{self._url}/v1"

    @property
    def model_name(self) -> str:
        return self._wish.model_id

    def begin(self) -> Talk:
        """Uses an instance of the model that is there already; else places one, waits for it, and asks for a token."""
        state = yield from self._state()
        running = [one for one in state.of_model(self.model_name) if self._wish.allows_instance(one)]
        if running:
            self._used = running[0].instance_id
            yield Told(
                text=f"the cluster runs {self.model_name} already: used, and left running at the end", stays=True
            )
        else:
            yield from self._place()
        yield from self._await_ready()
        yield from self._first_token()

    def check(self) -> Talk:
        """Raises when the cluster, the instance or one of its runners has gone."""
        state = yield from self._state()
        instance = state.instance(self._used)
        if instance is None:
            raise RuntimeFailedError(
                f"Exo has given up {self.model_name}: its instance has gone",
                hint=f"a node may have left the cluster: see {self._url} and the logs of the nodes",
            )
        if failure := state.failure(instance):
            raise RuntimeFailedError(f"Exo lost {self.model_name}: {failure}", hint="see the log of that node")

    def end(self) -> Talk:
        """Deletes the instance if it is ours, and waits until it has gone: its memory is given back by then."""
        if self.instance_id is None:
            return
        asked = False
        for _ in range(int(_GOES_S / LOOK_S)):
            if not asked:  # 404: we were stopped so early that Exo has yet to make it
                answer = yield from _call("DELETE", f"{self._url}/instance/{quote(self.instance_id, safe='')}")
                asked = answer.status == _OK
            state = yield from self._state()
            if asked and state.instance(self.instance_id) is None:
                self.instance_id = None
                return
            yield Pause(seconds=LOOK_S)
        if asked:
            raise RuntimeFailedError(
                f"Exo has not deleted instance {self.instance_id} of {self.model_name} after {_GOES_S} s",
                hint=f"look at {self._url}, and delete it there",
            )

    @property
    def undo(self) -> tuple[Call, ...]:
        """The instance is deleted, if it is ours and made by now."""
        if self.instance_id is None:
            return ()
        return (Call(method="DELETE", url=f"{self._url}/instance/{quote(self.instance_id, safe='')}"),)

    def _place(self) -> Part[None]:
        """Asks for placements, creates the best, and knows its id from then on."""
        query = urlencode({"model_id": self.model_name})
        answer = yield from _call("GET", f"{self._url}/instance/previews?{query}", timeout_s=60.0)
        if answer.status in {400, 500}:  # 500: no such repository, from the look-up behind it
            raise BadModelError(
                f"Exo cannot use {self.model_name}: {reason(answer)}",
                hint="give the id of an MLX model on Hugging Face, and see that the cluster reaches it",
            )
        previews = body_of(answer, Previews, "placements", self._url).previews
        best = best_placement(previews, self._wish)
        if best is None or best.placed is None:
            raise unplaceable(previews, self._wish)
        self.instance_id = self._used = best.placed.instance_id
        nodes = f"{best.n_nodes} node{'s' if best.n_nodes > 1 else ''}"
        yield Told(text=f"placing {self.model_name} on {nodes}{mode_words(best)}")
        created = yield from _call("POST", f"{self._url}/instance", body={"instance": best.instance})
        if created.status not in {0, _OK}:  # 0: it may have come through
            self.instance_id = None
            raise refused(self.model_name, reason(created))

    def _await_ready(self) -> Part[None]:
        """Until every runner of the instance is up: as long as it goes on."""
        loading = Loading(self.model_name, self._used)
        while True:
            state = yield from self._state()
            told = loading.look(state)
            yield told
            if loading.ready:
                return
            yield Pause(seconds=LOOK_S)

    def _first_token(self) -> Part[None]:
        """Raises unless one comes, in words or in thoughts."""
        messages = [{"role": "user", "content": "Hello"}]
        body = {"model": self.model_name, "messages": messages, "max_tokens": 1, "stream": True}
        url = f"{self.endpoint}/chat/completions"
        answer = yield Call(method="POST", url=url, body=body, timeout_s=_FIRST_TOKEN_S, stream=True)
        while answer is not None and not has_token(answer):
            if answer.status != _OK or has_error(answer):
                raise RuntimeFailedError(
                    f"Exo loaded {self.model_name}, but answers the first request with: {reason(answer)}",
                    hint="see the logs of its nodes",
                )
            if answer.end:
                raise RuntimeFailedError(
                    f"Exo loaded {self.model_name}, but answered the first request without a token",
                    hint="see the logs of its nodes",
                )
            answer = yield More()

    def _state(self) -> Part[State]:
        answer = yield from _call("GET", f"{self._url}/state")
        return body_of(answer, State, "state", self._url)


def _call(method: _Method, url: str, *, body: dict[str, object] | None = None, timeout_s: float = 30.0) -> Part[Answer]:
    """One request, and its answer."""
    answer = yield Call(method=method, url=url, body=body, timeout_s=timeout_s)
    return answer if answer is not None else Answer(status=0)
