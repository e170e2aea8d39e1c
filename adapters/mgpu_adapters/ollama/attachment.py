"""A model on an Ollama server: created from one it has or from files, loaded, proven by a token, and removed again.

Conversations without I/O. Endpoints and their behaviour: ollama fb30760 (v0.33.0-rc2), docs/api.md, server/routes.go,
server/create.go; the same calls from 0.6 on.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final, TypeVar

from mgpu.errors import OutOfMemoryError, RuntimeFailedError
from mgpu.service import Answer, Call, Digest, More, Pause, Said, Space, Talk, Told
from mgpu.units import MIB, gib
from mgpu_adapters.ollama.log import read_refusal
from mgpu_adapters.ollama.names import Wish

T = TypeVar("T")
Part = Generator[Call | More | Digest | Space | Told | Pause | Said, "Answer | None", T]

_OK: Final = 200
_LOAD_S: Final = 3600.0  # from a slow disk; Ollama itself gives up a load that stalls (OLLAMA_LOAD_TIMEOUT)
_CREATE_S: Final = 3600.0  # between two words of it: a large file is rewritten
_TOKEN_S: Final = 600.0

#: Where stores lie on this machine (docs/faq.mdx).
STORES: Final = ("$OLLAMA_MODELS", "~/.ollama/models", "/usr/share/ollama/.ollama/models", "/")

#: Looks until memory that is given back is free, and seconds between them.
_GOES: Final = 50
_LOOK_S: Final = 0.2

#: What is said of a plan that came out differently: beyond this share, and this much.
_OFF_SHARE: Final = 0.1
_OFF_BYTES: Final = 256 * MIB


class OllamaAttachment:
    """Implements `mgpu.adapter.Attachment`. `local`: the server's store is on this machine, and its disk."""

    def __init__(self, url: str, wish: Wish, *, local: bool) -> None:
        self._url = url
        self._wish = wish
        self._local = local

    @property
    def endpoint(self) -> str:
        return f"{self._url}/v1"

    @property
    def model_name(self) -> str:
        return self._wish.name

    def begin(self) -> Talk:
        wish = self._wish
        for words in wish.unheld:
            yield Told(text=f"warning: the Ollama that runs cannot be held to this plan: {words}", stays=True)
        source = wish.alias
        if source is None:
            source = yield from self._imported()
        body = {"model": wish.name, "from": source, "parameters": dict(wish.parameters)}
        yield from self._create(body, source)
        yield Told(text=f"loading {wish.alias or wish.stem.removeprefix('mgpu-')}")
        yield from self._load()
        yield from self._prove()
        yield from self._compare()

    def check(self) -> Talk:
        loaded = yield from self._loaded()
        if loaded is None:
            raise RuntimeFailedError(
                f"Ollama holds {self.model_name} no longer: it was stopped, or had to go for another model",
                hint="stop the other model first (`ollama ps`, `ollama stop NAME`), then again",
            )
        ctx = loaded.get("context_length")
        if isinstance(ctx, int) and ctx and ctx != self._wish.ctx:
            yield Told(
                text=f"warning: a client had {self.model_name} loaded anew with a context of {ctx}: "
                "leave options like num_ctx out of requests",
                stays=True,
            )

    def end(self) -> Talk:
        name = self.model_name
        yield Told(text=f"unloading {name}")
        answer = yield from self._ask(
            Call(method="POST", url=self._at("generate"), body={"model": name, "keep_alive": 0})
        )
        if answer.status == 0:
            return  # it has gone, and its memory with it
        yield from self._gone()
        yield from self._delete(name)
        if self._wish.removes and self._wish.alias is None:
            digest = yield from self._digest()
            yield from self._delete(self._wish.import_name(digest[0][1]))

    @property
    def undo(self) -> tuple[Call, ...]:
        """The model that was derived is unloaded and removed; the files it was made from stay, as without --rm."""
        name = self.model_name
        return (
            Call(method="POST", url=self._at("generate"), body={"model": name, "keep_alive": 0}),
            Call(method="DELETE", url=self._at("delete"), body={"model": name}),
        )

    def _imported(self) -> Part[str]:
        """The name of the files' model on the server, which is there already or is made now."""
        wish = self._wish
        digests = yield from self._digest()
        name = wish.import_name(digests[0][1])
        known = yield from self._ask(Call(method="POST", url=self._at("show"), body={"model": name}))
        if known.status == _OK:
            return name
        missing: list[tuple[str, str]] = []
        for path, digest in digests:
            head = yield from self._ask(Call(method="HEAD", url=self._at(f"blobs/sha256:{digest}")))
            if head.status != _OK:
                missing.append((path, digest))
        yield from self._check_space(all_there=not missing)
        for path, digest in missing:
            yield from self._upload(path, digest)
        files = {path.rpartition("/")[2]: f"sha256:{digest}" for path, digest in digests}
        yield from self._create({"model": name, "files": files}, name)
        what = "it is removed again at the end" if wish.removes else f"`ollama rm {name}`, or -- --rm, gives that back"
        yield Told(text=f"note: imported into Ollama as {name} ({gib(wish.file_bytes)}); {what}", stays=True)
        return name

    def _digest(self) -> Part[list[tuple[str, str]]]:
        """Each file with its sha256, 64 hex digits."""
        digests: list[tuple[str, str]] = []
        for path in self._wish.paths:
            yield Told(text=f"reading {path.rpartition('/')[2]} for its digest")
            answer = yield Digest(path=path)
            assert answer is not None  # noqa: S101 - a question is always answered
            if answer.status != _OK:
                raise RuntimeFailedError(f"{path} cannot be read: {answer.body}", hint="check who may read it: ls -l")
            digests.append((path, answer.body))
        return digests

    def _check_space(self, *, all_there: bool) -> Part[None]:
        """From 0.30 on a file that was sent is written once more before it is dropped (server/create.go)."""
        copies = self._wish.copies - all_there
        if not self._local or copies < 1:
            return
        answer = yield Space(directories=STORES)
        free = answer.body if answer is not None else None
        needed = self._wish.file_bytes * copies
        if isinstance(free, int) and free < needed:
            raise RuntimeFailedError(
                f"importing {gib(self._wish.file_bytes)} takes {gib(needed)} in Ollama's store: {gib(free)} are free",
                hint="make room, or use --runtime llama.cpp, which reads the file where it lies",
            )

    def _upload(self, path: str, digest: str) -> Part[None]:
        yield Told(text=f"sending {path.rpartition('/')[2]} to Ollama")
        url = self._at(f"blobs/sha256:{digest}")
        answer = yield from self._ask(Call(method="POST", url=url, upload=path, timeout_s=_CREATE_S))
        if answer.status not in {_OK, 201}:
            raise RuntimeFailedError(
                f"Ollama does not take {path}: {_reason(answer)}", hint="the file must not change while it is sent"
            )

    def _create(self, body: dict[str, Any], source: str) -> Part[None]:
        name = body["model"]
        call = Call(method="POST", url=self._at("create"), body=body, timeout_s=_CREATE_S, stream=True)
        answer = yield from self._ask(call)
        succeeded = False
        while answer.status == _OK and not answer.end and not _has_error(answer):
            words = answer.body if isinstance(answer.body, dict) else {}
            succeeded = words.get("status") == "success"
            done, total = _count(words, "completed"), _count(words, "total")
            if "files" in body:  # else it is a matter of a moment
                yield Told(text=f"Ollama: {words.get('status', 'creating')}", done=done, total=total)
            more = yield More()
            assert more is not None  # noqa: S101 - a question is always answered
            answer = more
        if answer.status == _OK and succeeded and not _has_error(answer):
            return
        reason = _reason(answer) if answer.status != _OK or _has_error(answer) else "it broke off without a word"
        raise RuntimeFailedError(f"Ollama does not create {name}: {reason}", hint=self._create_hint(reason, source))

    def _create_hint(self, reason: str, source: str) -> str:
        if "not found" in reason or "does not exist" in reason:
            return f"its store may be another: `ollama list` shows what it has, `ollama pull {source}` fetches it"
        if "validate GGUF" in reason:
            return "its llama.cpp does not know this model: update Ollama, or use --runtime llama.cpp"
        if "permission denied" in reason:
            return "its store cannot be written: run as its owner, or set OLLAMA_MODELS to a store of your own"
        if "unknown parameter" in reason:
            return "leave it out after `--`"
        return "`ollama serve` logs more; --runtime llama.cpp needs no import"

    def _load(self) -> Part[None]:
        """An empty request loads the model with its own parameters, for as long as nobody unloads it."""
        body = {"model": self.model_name, "keep_alive": -1, "stream": False}
        answer = yield from self._ask(Call(method="POST", url=self._at("generate"), body=body, timeout_s=_LOAD_S))
        if answer.status == _OK and not _has_error(answer):
            return
        reason = _reason(answer)
        raise _not_loaded(f"Ollama does not load {self.model_name}: {reason}", reason, answer.status)

    def _prove(self) -> Part[None]:
        """A token as clients ask for it, which must not have the model loaded anew."""
        body = {"model": self.model_name, "prompt": "Hello", "max_tokens": 1}
        url = f"{self.endpoint}/completions"
        answer = yield from self._ask(Call(method="POST", url=url, body=body, timeout_s=_TOKEN_S))
        reason = _reason(answer)
        if answer.status in {400, 501} and "not support" in reason:  # a model for embeddings
            yield Told(text=f"note: it is loaded, but could not be asked for a token: {reason}", stays=True)
        elif answer.status != _OK or _has_error(answer):
            raise _not_loaded(f"Ollama answered the first request with {reason}", reason, answer.status)
        elif not _has_token(answer):
            raise RuntimeFailedError("Ollama answered the first request without a token", hint="see its log")

    def _compare(self) -> Part[None]:
        """What it says that it holds, against the plan."""
        loaded = yield from self._loaded()
        if loaded is None:
            yield Told(text=f"warning: Ollama does not list {self.model_name} as loaded", stays=True)
            return
        size, on_cards = _count(loaded, "size"), _count(loaded, "size_vram")
        wish = self._wish
        if wish.on_cards and size - on_cards > _OFF_BYTES:
            words = f"Ollama holds {gib(size - on_cards)} of {gib(size)} in RAM; all of it was planned on cards"
            yield Told(text=f"warning: {words}", stays=True)
        elif abs(on_cards - wish.card_bytes) > max(_OFF_SHARE * wish.card_bytes, _OFF_BYTES):
            words = f"Ollama holds {gib(on_cards)} on cards, {gib(wish.card_bytes)} was planned"
            yield Told(text=f"warning: {words}", stays=True)

    def _loaded(self) -> Part[dict[str, Any] | None]:
        """Its row of /api/ps."""
        answer = yield from self._ask(Call(method="GET", url=self._at("ps")))
        rows = answer.body.get("models") if answer.status == _OK and isinstance(answer.body, dict) else None
        if answer.status != _OK:
            raise RuntimeFailedError(f"Ollama at {self._url} does not say what it holds: {_reason(answer)}", hint="")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and self.model_name in {row.get("name"), row.get("model")}:
                return row
        return None

    def _gone(self) -> Part[None]:
        """Waits until its memory is free."""
        for _ in range(_GOES):
            if (yield from self._loaded()) is None:
                return
            yield Pause(seconds=_LOOK_S)
        raise RuntimeFailedError(f"Ollama still holds {self.model_name}", hint=f"ollama stop {self.model_name}")

    def _delete(self, name: str) -> Part[None]:
        answer = yield from self._ask(Call(method="DELETE", url=self._at("delete"), body={"model": name}))
        if answer.status not in {_OK, 404}:
            raise RuntimeFailedError(f"Ollama does not remove {name}: {_reason(answer)}", hint=f"ollama rm {name}")

    def _ask(self, call: Call) -> Part[Answer]:
        """Raises where nobody answers, except at the end, when it does not matter any more."""
        answer = yield call
        assert answer is not None  # noqa: S101 - a call is always answered
        ending = call.body is not None and call.body.get("keep_alive") == 0
        if answer.status == 0 and not ending:
            raise RuntimeFailedError(
                f"Ollama at {self._url} does not answer: {answer.body}", hint="is it still running? `ollama ps` asks it"
            )
        return answer

    def _at(self, path: str) -> str:
        return f"{self._url}/api/{path}"


def _not_loaded(message: str, reason: str, status: int) -> RuntimeFailedError:
    cause = read_refusal(reason)
    if cause is not None and cause.out_of_memory:
        return OutOfMemoryError(message, hint=cause.hint, devices=cause.devices, wanted_bytes=cause.wanted_bytes)
    if cause is not None:
        return RuntimeFailedError(message, hint=cause.hint)
    if status == 503:
        return RuntimeFailedError(message, hint="too many requests wait for it: try again")
    return RuntimeFailedError(message, hint="use a smaller --ctx, or see what else holds memory: `ollama ps`")


def _has_error(answer: Answer) -> bool:
    return isinstance(answer.body, dict) and "error" in answer.body


def _reason(answer: Answer) -> str:
    """What it says is wrong, in one line; OpenAI's errors are objects."""
    error = answer.body.get("error") if isinstance(answer.body, dict) else answer.body
    if isinstance(error, dict):
        error = error.get("message")
    text = " ".join(str(error or "").split())[:300]
    return text or f"HTTP {answer.status}"


def _has_token(answer: Answer) -> bool:
    body = answer.body if isinstance(answer.body, dict) else {}
    usage = body.get("usage")
    return isinstance(usage, dict) and _count(usage, "completion_tokens") > 0


def _count(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    return value if isinstance(value, int) and 0 < value < 1 << 63 else 0
