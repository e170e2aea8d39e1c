"""What runtimes and services answer: a token, event streams, talks with Ollama, Exo and mycoSwarm; mgpu's own files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from fuzz.target import Target, check_line, scratch
from mgpu.adapter import Adapter, Probe
from mgpu.errors import (
    BadModelError,
    DoesNotFitError,
    MgpuError,
    RefusedError,
    RuntimeFailedError,
    RuntimeMissingError,
    UsageError,
)
from mgpu.launch import client, digests, measure, probe, records
from mgpu.launch.progress import ToldLine
from mgpu.launch.stream import error_message, read_pieces
from mgpu.service import TOKEN, Answer, Call, Digest, More, Said, Space, Talk, Told
from mgpu_adapters.exo.adapter import Exo
from mgpu_adapters.exo.attachment import ExoAttachment
from mgpu_adapters.exo.placing import Wish as ExoWish
from mgpu_adapters.mycoswarm.adapter import MycoSwarm
from mgpu_adapters.mycoswarm.attachment import SwarmAttachment
from mgpu_adapters.ollama.attachment import OllamaAttachment
from mgpu_adapters.ollama.names import Wish

_FAILED: Final[tuple[type[MgpuError], ...]] = (RuntimeFailedError,)
_STEPS: Final = 400
#: What a talk may end with; `BadModelError`: the service does not know the model.
_TALKED: Final = (RuntimeFailedError, BadModelError, DoesNotFitError, RefusedError, UsageError)
_LOAD: Final = measure.Load(n_prompt=8, n_gen=4, repetitions=1, n_vocab=32)


def _token(data: bytes) -> None:
    client._check_token(200 if data[-1:] != b"\n" else 500, data, "^b[0-9]+$" if data[:1] == b" " else "")


def _timing(data: bytes) -> None:
    timing = measure._read(200, data, _LOAD)
    assert timing.tok_s > 0, timing


def _stream(data: bytes) -> None:
    for piece in read_pieces(data.split(b"\n")):
        assert piece.text


def _error(data: bytes) -> None:
    assert len(error_message(data)) <= 300


# Talks


def _answers(data: bytes) -> Iterator[Answer]:
    """Each line is one: a status, then the body. After the last, nobody answers."""
    for line in data.split(b"\n"):
        status, _, body = line.partition(b" ")
        number = int(status) if status.isdigit() and len(status) == 3 else 200
        try:
            decoded: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            decoded = body.decode("utf-8", "replace")
        yield Answer(status=number, body=decoded, end=line.endswith(b" "))


def _hold(talk: Talk, answers: Iterator[Answer]) -> None:
    """The other end of a talk. One without an end of its own is left after a while, as by Ctrl-C."""
    out = io.StringIO()
    line = ToldLine(out)
    answer: Answer | None = None
    for _ in range(_STEPS):
        try:
            asked = talk.send(answer)
        except StopIteration:
            break
        answer = None
        if isinstance(asked, Call | More):
            answer = next(answers, Answer(status=0, body="connection refused"))
        elif isinstance(asked, Digest):
            answer = Answer(status=200, body="0" * 64)
        elif isinstance(asked, Space):
            answer = Answer(status=200, body=1 << 40)
        elif isinstance(asked, Told):
            line(asked)
        elif isinstance(asked, Said):
            assert isinstance(asked.text, str)
    talk.close()
    for told in out.getvalue().split("\n"):
        check_line(told, 1000)


def _all_of(make: Callable[[], Any]) -> Callable[[bytes], None]:
    """A target for `begin`, `check` and `end`, one after the other, as far as they come."""

    def check(data: bytes) -> None:
        attachment, answers = make(), _answers(data)
        _hold(attachment.begin(), answers)
        _hold(attachment.check(), answers)
        _hold(attachment.end(), answers)
        if hasattr(attachment, "answer"):
            _hold(attachment.answer("Hello"), answers)

    return check


def _ollama() -> OllamaAttachment:
    wish = Wish(
        name="mgpu-m",
        stem="m",
        alias=None,
        paths=("/m.gguf",),
        file_bytes=1 << 30,
        parameters={"num_ctx": 4096},
        ctx=4096,
        card_bytes=1 << 30,
        on_cards=True,
        copies=2,
        removes=True,
    )
    return OllamaAttachment("http://127.0.0.1:11434", wish, local=True)


def _exo() -> ExoAttachment:
    return ExoAttachment("http://127.0.0.1:52415", ExoWish(model_id="mlx-community/m"))


def _swarm() -> SwarmAttachment:
    return SwarmAttachment("http://127.0.0.1:7890", "t", "m:latest", 4096)


_CREATED: Final = b'200 {"status": "success"}\n200  \n'
_PS: Final = (
    b'200 {"models": [{"name": "mgpu-m", "size": 1073741824, "size_vram": 1073741824, "context_length": 4096}]}\n'
)
_USAGE: Final = b'200 {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}\n'
_INSTANCE: Final = (
    b'{"MlxRingInstance": {"instanceId": "i", "shardAssignments": {"modelId": "mlx-community/m", "nodeToRunner": '
    b'{"n": "r"}, "runnerToShard": {"r": {"PipelineShardMetadata": {"startLayer": 0, "endLayer": 16}}}}}}'
)
_STATE: Final = (
    b'{"topology": {"nodes": ["n"]}, "nodeIdentities": {"n": {"chipId": "M3", "friendlyName": "mac"}}, "nodeMemory": '
    b'{"n": {"ramTotal": {"inBytes": 68719476736}, "ramAvailable": {"inBytes": 34359738368}}}, "instances": {"i": '
    + _INSTANCE
    + b'}, "runners": {"r": {"RunnerReady": {}}}, "downloads": {"n": [{"DownloadOngoing": {"downloadProgress": '
    b'{"total": '
    b'{"inBytes": 10}, "downloaded": {"inBytes": 1}}, "shardMetadata": {"P": {"modelCard": {"modelId": '
    b'"mlx-community/m"}}}}}]}}'
)


def _ollama_seeds() -> Iterator[bytes]:
    yield (
        b'404 {"error": "not found"}\n404 \n201 \n'
        + 2 * _CREATED
        + b'200 {"done": true}\n'
        + _USAGE
        + 2 * _PS
        + b'200 {}\n200 {"models": []}\n200 {}\n200 {}'
    )
    yield b'200 {}\n200 {"status": "writing", "completed": 5, "total": 9}\n200 {"error": "unknown parameter"}\n'


def _exo_seeds() -> Iterator[bytes]:
    state, chat = b"200 " + _STATE + b"\n", b'200 {"choices": [{"delta": {"content": "a"}}]}\n'
    yield 2 * state + chat + state + b"200 {}\n" + state
    preview = (
        b'200 {"previews": [{"sharding": "Pipeline", "instance_meta": "MlxRing", "instance": ' + _INSTANCE + b"}]}\n"
    )
    yield b"200 {}\n" + preview + b"200 {}\n" + 2 * state + chat + state + b"200 {}\n200 {}\n"


_HEALTH: Final = b'{"node_id": "n", "hostname": "h", "peer_count": 1, "version": "0.6.0"}'
_STATUS: Final = (
    b'{"node_id": "n", "hostname": "h", "gpu": "RTX 3090", "vram_total_mb": 24576, "vram_free_mb": 24000, '
    b'"ollama_models": ["m:latest"]}'
)
_PEERS: Final = (
    b'[{"node_id": "p", "hostname": "q", "gpu_name": "RTX 3060", "vram_total_mb": 12288, '
    b'"available_models": ["m:latest"]}]'
)


def _swarm_seeds() -> Iterator[bytes]:
    submitted = b'200 {"task_id": "t", "message": "Routed to q", "target_ip": "10.0.0.2", "target_port": 7890}\n'
    over = b'200 {"status": "completed", "result": {"response": "a", "eval_count": 1, "model": "m:latest"}}\n'
    events = b'200 {"token": "a"}\n200 {"done": true, "model": "m:latest"}\n'
    yield submitted + over + b"200 " + _STATUS + b"\n200 " + _PEERS + b"\n" + submitted + events + over


# What a service says of itself


def _service(adapter: Adapter, paths: tuple[str, ...]) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        texts = data.decode("utf-8", "replace").split("\n---\n")
        outputs = {path: text for path, text in zip(paths, texts, strict=False) if text}
        installed = adapter.installed(
            Probe(executable="http://h:1", origin="running", outputs=outputs, url="http://h:1")
        )
        check_line(installed.version)
        for device in installed.devices or ():
            check_line(device.device + device.description)

    return check


# mgpu's own files


def _cache(data: bytes) -> None:
    path = scratch() / "cache.json"
    path.write_bytes(data)
    for told in (probe._read_cache(path), digests._read(path)):
        assert all(isinstance(key, str) and isinstance(text, str) for key, text in told.items())
    probe._write_cache(path, {"a": "b"})
    assert probe._read_cache(path) == {"a": "b"}
    assert not [name for name in os.listdir(scratch()) if name != "cache.json"]  # noqa: PTH208 - names are all it takes


def _record(data: bytes) -> None:
    """What another mgpu left of a launch. What is read is written as it was read."""
    record = records.from_text(data)
    assert record is None or records.from_text(records.to_text(record)) == record


_RECORD: Final = (
    b'{"schema": 1, "name": "m", "state": "ready", "cards": [{"key": "GPU-1", "gpu": 0, "planned": 5, "held": null}], '
    b'"ports": [8080], "runtimes": [{"pid": 42, "start": "1 2"}], "directories": ["/tmp/mgpu-x"], "after": [["docker", '
    b'"rm", "x"]], "work": {"requests": 1, "tok_s": 2.5}, "started": 1.5, "end": {"exit_code": 7, "message": "x"}}'
)

_KEYS: Final = (
    "error message status models name size size_vram usage completion_tokens content choices delta text reasoning "
    "timings predicted_n predicted_ms prompt_n prompt_ms tokens_predicted system_fingerprint instances runners "
    "RunnerFailed RunnerLoading errorMessage DownloadFailed downloadProgress previews instance shardAssignments token "
    "done result response detail target_ip target_port version context_length completed total friendlyName"
)
_SAID: Final = (b"data: ", b"error: ", b"[DONE]", b"\n---\n", b"503 ", b"404 ", b"200 ", b'"\\u001b[2J"', b'"\\ud83d"')
_JSON: Final = (*(f'"{word}"'.encode() for word in _KEYS.split()), *_SAID)

TARGETS: Final = (
    Target(
        name="token",
        check=_token,
        refuses=_FAILED,
        tokens=_JSON,
        seeds=lambda: (
            b'{"content": "a", "tokens_predicted": 1}',
            b'{"usage": {"completion_tokens": 1}, "system_fingerprint": "b1"}',
            b' {"error": {"message": "no", "code": 500}}\n',
            b'{"error": "text"}\n',
        ),
    ),
    Target(
        name="timing",
        check=_timing,
        refuses=_FAILED,
        tokens=_JSON,
        seeds=lambda: (b'{"timings": {"predicted_n": 4, "predicted_ms": 12.5, "prompt_n": 8, "prompt_ms": 3.0}}',),
    ),
    Target(
        name="event-stream",
        check=_stream,
        refuses=_FAILED,
        tokens=_JSON,
        seeds=lambda: (
            b'data: {"choices": [{"delta": {"content": "a", "reasoning_content": "b"}}]}\n\ndata: [DONE]\n',
            b'data: {"content": "a"}\n',
            b'error: {"message": "no"}\n',
            b'data: {"choices": [{"text": "a"}]}\n',
        ),
    ),
    Target(
        name="error-body", check=_error, tokens=_JSON, seeds=lambda: (b'{"error": {"message": "no"}}', b"Not Found")
    ),
    Target(name="talk-ollama", check=_all_of(_ollama), refuses=_TALKED, tokens=_JSON, seeds=_ollama_seeds),
    Target(name="talk-exo", check=_all_of(_exo), refuses=_TALKED, tokens=_JSON, seeds=_exo_seeds, weight=0.5),
    Target(name="talk-mycoswarm", check=_all_of(_swarm), refuses=_TALKED, tokens=_JSON, seeds=_swarm_seeds, weight=0.5),
    Target(
        name="service-exo",
        check=_service(Exo(), ("/state", "/models", "/node_id")),
        refuses=(RuntimeMissingError,),
        tokens=_JSON,
        seeds=lambda: (_STATE + b'\n---\n{"data": [{"id": "a/b"}]}\n---\n"n"',),
    ),
    Target(
        name="service-mycoswarm",
        check=_service(MycoSwarm(), ("/health", "/status", "/peers", TOKEN)),
        refuses=(RuntimeMissingError,),
        tokens=_JSON,
        seeds=lambda: (b"\n---\n".join((_HEALTH, _STATUS, _PEERS)),),
    ),
    Target(name="record", check=_record, tokens=_JSON, seeds=lambda: (_RECORD,)),
    Target(name="cache", check=_cache, weight=0.1, seeds=lambda: (b'{"/bin/x|1|2|3|--help": "text"}',)),
)
