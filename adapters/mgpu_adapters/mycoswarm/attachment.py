"""A model on a swarm: proven by a token through its router, asked, and left as it is. Conversations without I/O.

Endpoints and their behaviour: mycoswarm 0.6.0 (PyPI) `api.py`, `worker.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping
from typing import Any, Final, Literal, TypeVar
from urllib.parse import quote

from mgpu.errors import RuntimeFailedError
from mgpu.service import Answer, Call, Digest, More, Pause, Said, Space, Talk, Told
from mgpu_adapters.mycoswarm.swarm import Outcome, Peer, Status, Submitted, decode, nodes_of

T = TypeVar("T")
Part = Generator[Call | More | Digest | Space | Told | Pause | Said, "Answer | None", T]

_LOOK_S: Final = 0.5
#: Its worker gives Ollama 300 s (`OLLAMA_TIMEOUT`); what is then not over has been lost on the way.
_TASK_S: Final = 300
_LOOKS: Final = int((_TASK_S + 30) / _LOOK_S)
_ANSWER_TOKENS: Final = 4096
_OK: Final = 200


class SwarmAttachment:
    """Implements `mgpu.adapter.Attachment` and `Asked`: a swarm has no OpenAI API. Nothing is taken, or given back."""

    def __init__(self, url: str, token: str, name: str, ctx: int) -> None:
        self._url = url
        self._headers = {"X-Swarm-Token": token} if token else {}
        self._name = name
        self._ctx = ctx

    @property
    def endpoint(self) -> str:
        return f"{self._url}/task"

    @property
    def model_name(self) -> str:
        return self._name

    def begin(self) -> Talk:
        """One token, by the way that every question takes."""
        submitted = yield from self._submit("Hello", max_tokens=1)
        node = submitted.message.removeprefix("Routed to ") if submitted.target_ip else "the node that was asked"
        yield Told(text=f"loading {self._name} on {node}")
        outcome = yield from self._await(submitted.task_id)
        self._check_model(outcome.model)
        if not outcome.has_token:
            raise RuntimeFailedError(f"the swarm answered the first request to {self._name} without a token")
        yield Told(
            text=f"routed to {node}; ask by POST {self.endpoint} with X-Swarm-Token, or by `mycoswarm ask`: "
            "it has no OpenAI API",
            stays=True,
        )

    def check(self) -> Talk:
        """Raises when the daemon does not answer any more, or no node has the model."""
        status = self._read((yield from self._ask("GET", "/status")), Status)
        peers = self._read((yield from self._ask("GET", "/peers")), tuple[Peer, ...])
        if not any(self._name in node.models for node in nodes_of(status, peers)):
            raise RuntimeFailedError(
                f"no node of the swarm has {self._name} any more", hint="see `mycoswarm swarm` and its nodes"
            )

    def end(self) -> Talk:
        """Nothing to give back: the node's Ollama keeps the model, as it does for everybody."""
        yield from ()

    def answer(self, prompt: str) -> Talk:
        """As it is generated, from the node that generates it; all at once where that node cannot be reached."""
        submitted = yield from self._submit(prompt, max_tokens=_ANSWER_TOKENS)
        base = f"http://{submitted.target_ip}:{submitted.target_port}" if submitted.target_ip else self._url
        url = f"{base}/task/{quote(submitted.task_id, safe='')}/stream"
        event = yield Call(method="GET", url=url, headers=self._headers, timeout_s=_TASK_S, stream=True)
        begun = False
        while event is not None and event.status == _OK and not event.end:
            told = event.body if isinstance(event.body, Mapping) else {}
            if told.get("error"):
                raise RuntimeFailedError(f"the swarm does not answer: {told['error']}")
            if told.get("done"):
                self._check_model(str(told.get("model", "")))
                return
            begun = True
            yield Said(text=str(told.get("token", "")))
            event = yield More()
        if begun:
            raise RuntimeFailedError("the swarm broke off the answer", hint="a node may have gone: `mycoswarm swarm`")
        outcome = yield from self._await(submitted.task_id)
        self._check_model(outcome.model)
        yield Said(text=str((outcome.result or {}).get("response", "")))

    def _submit(self, prompt: str, *, max_tokens: int) -> Part[Submitted]:
        body = task(f"mgpu-{uuid.uuid4().hex[:12]}", self._name, prompt, ctx=self._ctx, max_tokens=max_tokens)
        return self._read((yield from self._ask("POST", "/task", body)), Submitted)

    def _await(self, task_id: str) -> Part[Outcome]:
        """The outcome, as the daemon relays it. Raises for a failure, and for none at all."""
        for _ in range(_LOOKS):
            outcome = self._read((yield from self._ask("GET", f"/task/{quote(task_id, safe='')}")), Outcome)
            if outcome.status == "failed":
                raise RuntimeFailedError(
                    f"the swarm cannot run {self._name}: {outcome.error or 'no reason given'}",
                    hint="see the log of that node's daemon, and its Ollama",
                )
            if outcome.over:
                return outcome
            yield Pause(seconds=_LOOK_S)
        raise RuntimeFailedError(
            f"the swarm has not answered for {_TASK_S} s",
            hint="see the logs of its nodes: `mycoswarm swarm` lists them",
        )

    def _check_model(self, model: str) -> None:
        """It takes another model where a node has lost the one that was asked for, and says so in its log alone."""
        if model and model != self._name:
            raise RuntimeFailedError(
                f"the swarm answered with {model} instead of {self._name}", hint=f"`ollama pull {self._name}` on a node"
            )

    def _ask(self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None = None) -> Part[Answer]:
        answer = yield Call(method=method, url=f"{self._url}{path}", body=body, headers=self._headers)
        return answer if answer is not None else Answer(status=0)

    def _read(self, answer: Answer, kind: type[T]) -> T:
        if answer.status == 0:
            raise RuntimeFailedError(
                f"lost the mycoSwarm at {self._url}: {answer.body or 'no answer'}",
                hint="see whether `mycoswarm daemon` still runs there",
            )
        if answer.status != _OK:
            raise RuntimeFailedError(
                f"the swarm refuses {self._name}: {_detail(answer)}", hint=_HINTS.get(answer.status, "")
            )
        try:
            return decode(answer.body, kind)
        except ValueError as error:
            raise RuntimeFailedError(f"mycoSwarm answers in a way that mgpu does not know: {error}") from error


_HINTS: Final = {
    403: "copy ~/.config/mycoswarm/swarm-token from that machine: all nodes of a swarm share one",
    502: "the node it chose is gone: `mycoswarm swarm` shows who is there",
    503: "no node with Ollama is free: `mycoswarm swarm` shows who is there",
}


def task(task_id: str, name: str, prompt: str, *, ctx: int, max_tokens: int) -> dict[str, Any]:
    """The body of `POST /task`. `num_ctx` stays the same for all, or Ollama would load the model anew."""
    return {
        "task_id": task_id,
        "task_type": "inference",
        "payload": {
            "model": name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "num_ctx": ctx,
        },
        "source_node": "mgpu",
        "timeout_seconds": _TASK_S,
    }


def _detail(answer: Answer) -> str:
    """FastAPI's `{"detail": …}`."""
    body = answer.body.get("detail", answer.body) if isinstance(answer.body, Mapping) else answer.body
    return f"{body or f'HTTP {answer.status}'}"[:300]
