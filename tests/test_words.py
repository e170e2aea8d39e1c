"""What runtimes say of memory and of work: lines as they printed them, and lines nobody would print."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mgpu.adapter import Cause, LogFact, Served, Stage, Stats
from mgpu.errors import OutOfMemoryError, RuntimeFailedError
from mgpu.service import Answer, Call, More
from mgpu.units import GIB, MIB
from mgpu_adapters.aikit.log import read_line as read_aikit
from mgpu_adapters.exllama.log import read_line as read_exllama
from mgpu_adapters.llamacpp.log import read_line as read_llamacpp
from mgpu_adapters.llamacpp.metrics import read_metrics as read_llamacpp_metrics
from mgpu_adapters.ollama.attachment import OllamaAttachment
from mgpu_adapters.ollama.log import read_line as read_ollama
from mgpu_adapters.ollama.log import read_refusal
from mgpu_adapters.ollama.names import Wish
from mgpu_adapters.vllm.log import read_line as read_vllm
from mgpu_adapters.vllm.metrics import read_metrics as read_vllm_metrics

Reader = Callable[[str], LogFact | None]

READERS: dict[str, Reader] = {
    "llama.cpp": read_llamacpp,
    "vllm": read_vllm,
    "exllama": read_exllama,
    "aikit": read_aikit,
    "ollama": read_ollama,
}

ANY_CUDA = ("CUDA0", "ROCm0", "MUSA0")
HOST = ("CPU",)


def short(reader: Reader, line: str) -> tuple[tuple[str, ...], int]:
    fact = reader(line)
    assert isinstance(fact, Cause), line
    assert fact.out_of_memory
    assert fact.hint
    assert "{" not in fact.text + fact.hint
    return fact.devices, fact.wanted_bytes


class TestLlamaCpp:
    @pytest.mark.parametrize(
        ("line", "devices", "wanted"),
        [
            (
                (
                    "0.01.2 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 20480.00 MiB on device 0: "
                    "cudaMalloc failed: out of memory"
                ),
                ANY_CUDA,
                20480 * MIB,
            ),
            (
                "alloc_tensor_range: failed to allocate CUDA1 buffer of size 4618543104",  # 2025
                ("CUDA1",),
                4618543104,
            ),
            (
                "0.6 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate Vulkan0 buffer of size 4096000000",
                ("Vulkan0",),
                4096000000,
            ),
            ("ggml_gallocr_reserve_n_impl: failed to allocate ROCm2 buffer of size 1048576", ("ROCm2",), MIB),
            ("x: failed to allocate RPC0[127.0.0.1:50052] buffer of size 1048576", ("RPC0",), MIB),
            ("x: failed to allocate Meta(CUDA0,CUDA1) buffer of size 1048576", ("Meta()",), MIB),
            ("llama_model_load: error loading model: unable to allocate CUDA0 buffer", ("CUDA0",), 0),
            ("llama_model_load: error loading model: unable to allocate CUDA0_Split buffer", ("CUDA0",), 0),
            ("error loading model: unable to allocate backend buffer", (), 0),  # 2024
            ("ggml_vulkan: Device memory allocation of size 4096000000 failed.", (), 4096000000),
            ("ggml_vulkan: No suitable memory type found: ErrorOutOfDeviceMemory", (), 0),
            ("terminate called after throwing an instance of 'vk::OutOfDeviceMemoryError'", (), 0),
            ("CUDA error: out of memory", (), 0),
            ("ROCm error: out of memory", (), 0),
            ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED", (), 0),
            (
                "ggml_metal_buffer_init: error: failed to allocate buffer, size =  8192.00 MiB",
                (),
                8 * GIB,
            ),
            ("x: failed to allocate Metal buffer of 1048576 bytes (out of memory)", (), MIB),
            ("error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)", (), 0),
            ("x: can't allocate 1048576 Bytes of memory on device", (), MIB),
            ("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", (), 0),
            ("x: allocating 64.00 MiB on device 3: aclrtMalloc failed: EL0004", ("CANN3",), 64 * MIB),
            ("llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache", (), 0),
            ("llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers", (), 0),
            ("graph_reserve: failed to allocate compute buffers", (), 0),
            ("0.3 E ggml_aligned_malloc: insufficient memory (attempted to allocate 384.00 MB)", HOST, 384 * MIB),
            (
                "0.3 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 402653184",
                HOST,
                384 * MIB,
            ),
            ("x: failed to allocate CPU buffer of size 402653184", HOST, 384 * MIB),
            ("x: failed to allocate CPU_REPACK buffer of size 402653184", HOST, 384 * MIB),
            ("x: failed to allocate CUDA_Host buffer of size 402653184", HOST, 384 * MIB),
            ("x: can't allocate 1048576 Bytes of memory on host", HOST, MIB),
            ("terminate called after throwing an instance of 'std::bad_alloc'", HOST, 0),
            ("llama_model_load: error loading model: mmap failed: Cannot allocate memory", HOST, 0),
            ("ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfHostMemory", HOST, 0),
        ],
    )
    def test_too_little_memory(self, line: str, devices: tuple[str, ...], wanted: int) -> None:
        assert short(read_llamacpp, line) == (devices, wanted)

    @pytest.mark.parametrize(
        "line",
        [
            "ggml_cuda_host_malloc: failed to allocate 512.00 MiB of pinned memory: out of memory",
            "WARNING: failed to allocate 512.00 MB of pinned memory",
            "ggml_vulkan: Failed to allocate pinned memory (vk::Device::allocateMemory: ErrorOutOfHostMemory)",
            "x: failed to allocate 4096 bytes for reorder temp buffer, skipping reorder",
            "x: device alloc of 4096 bytes failed, using host memory fallback",
            "warning: failed to mlock 7215545344-byte buffer (after previously locking 0 bytes): Cannot allocate",
            "srv  update: failed to allocate memory for prompt cache state: std::bad_alloc",
            "common_fit_params: failed to fit params to free device memory: n_gpu_layers already set by user, abort",
            "load_all_data: failed to allocate host buffer for async uploads for device CUDA0",
            "srv    load_model: prompt cache is enabled, size limit: 8192 MiB",
            "llama_kv_cache: size =   18.00 MiB (   512 cells,   3 layers,  2/2 seqs), K (f16):    9.00 MiB",
            "find_slot: failed to find free space in the KV cache",
            "common_memory_breakdown_print: |   - CUDA0 (RTX 4090)  | 24077 =  945 + (19187 = 17904 + 384 + 898) |",
        ],
    )
    def test_what_it_does_without_is_no_cause(self, line: str) -> None:
        assert not isinstance(read_llamacpp(line), Cause)

    def test_a_bad_flag_is_no_want_of_memory(self) -> None:
        fact = read_llamacpp("error: invalid argument: --memory")
        assert isinstance(fact, Cause)
        assert not fact.out_of_memory

    def test_a_second_attempt_is_a_stage(self) -> None:
        line = "sched_reserve: compute buffer allocation failed, retrying without pipeline parallelism"
        assert isinstance(read_llamacpp(line), Stage)

    def test_one_failure_in_several_lines(self) -> None:
        """As real servers printed them: the size first, the device later (b11434, Vulkan; CUDA by its source)."""
        vulkan = _told(
            read_llamacpp,
            "ggml_vulkan: Device memory allocation of size 4096000000 failed.",
            "ggml_vulkan: No suitable memory type found: ErrorOutOfDeviceMemory",
            "ggml_backend_buft_alloc_buffer_n_default: failed to allocate Vulkan1 buffer of size 4096000000",
            "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
        )
        assert (vulkan.devices, vulkan.wanted_bytes) == (("Vulkan1",), 4096000000)
        assert vulkan.text == "out of memory on Vulkan1 (asked for 3.8 GiB)"
        cuda = _told(
            read_llamacpp,
            "x: allocating 20480.00 MiB on device 0: cudaMalloc failed: out of memory",
            "llama_model_load: error loading model: unable to allocate ROCm0 buffer",
            "x: failed to allocate CPU buffer of size 402653184",
        )
        assert (cuda.devices, cuda.wanted_bytes) == (("ROCm0",), 20480 * MIB)

    @pytest.mark.parametrize(
        ("line", "served"),
        [
            (
                (
                    "0.01.352.287 I slot print_timing: id  1 | task 1 |        eval time =     "
                    "242.32 ms /    20 tokens "
                    "(   12.75 ms per token,    78.41 tokens per second)"
                ),
                Served(n_tokens=20, seconds=0.24232),
            ),
            (  # until 2026, several lines after one prefix
                "       eval time =     500.00 ms /   100 tokens (    5.00 ms per token,   200.00 tokens per second)",
                Served(n_tokens=100, seconds=0.5),
            ),
            (
                (
                    "0.01.352.240 I slot print_timing: id  1 | task 1 | prompt eval time =      "
                    "22.90 ms /     4 tokens "
                    "(    5.72 ms per token,   174.68 tokens per second)"
                ),
                None,
            ),
            ("prompt eval time =     22.90 ms /     4 tokens (    5.72 ms per token)", None),
            ("llama_perf_context_print:        eval time =     22.90 ms /     4 runs   (    5.72 ms per token)", None),
            ("       eval time =     0.00 ms /     1 tokens (     inf ms per token)", Served(n_tokens=1, seconds=0.0)),
            (f"       eval time =     {'9' * 5000}.00 ms /     1 tokens", None),
        ],
    )
    def test_requests_served(self, line: str, served: Served | None) -> None:
        fact = read_llamacpp(line)
        if served is None:
            assert fact is None
        else:
            assert isinstance(fact, Served)
            assert fact.n_tokens == served.n_tokens
            assert fact.seconds == pytest.approx(served.seconds)


def _told(reader: Reader, *lines: str) -> Cause:
    """What is known after all lines of a failure, as `Watch` keeps it."""
    causes = [fact for fact in map(reader, lines) if isinstance(fact, Cause)]
    cause = causes[0]
    for later in causes[1:]:
        cause = cause.with_more(later)
    return cause


def test_a_later_cause_of_another_kind_adds_nothing() -> None:
    first = Cause(text="the port is taken", hint="", port_taken=True)
    later = Cause(text="out of memory", hint="", out_of_memory=True, devices=("CUDA0",))
    assert first.with_more(later) is first
    assert later.with_more(first) is later


class TestTorch:
    @pytest.mark.parametrize("reader", [read_vllm, read_exllama, read_aikit])
    @pytest.mark.parametrize(
        ("line", "devices", "wanted"),
        [
            (
                (
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU "
                    "1 has a total capacity "
                    "of 23.64 GiB of which 100.00 MiB is free."
                ),
                ("cuda:1",),
                224 * MIB,
            ),
            (
                "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 23.69 GiB total",
                ("cuda:0",),
                2 * GIB,
            ),
            ("OutOfMemoryError: HIP out of memory. Tried to allocate 512 bytes. GPU 0 has a", ("cuda:0",), 512),
            ("torch.OutOfMemoryError: CUDA out of memory.", (), 0),
            ("torch.AcceleratorError: CUDA error: out of memory", (), 0),
            ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", (), 0),
            ("RuntimeError: NCCL Error 1: Cuda failure 2 'out of memory'", (), 0),
            (
                (
                    "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
                    "memory: you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
                ),
                HOST,
                GIB,
            ),
            ("MemoryError", HOST, 0),
            ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 2.00 GiB", HOST, 0),
            ("OSError: [Errno 12] Cannot allocate memory", HOST, 0),
        ],
    )
    def test_too_little_memory(self, reader: Reader, line: str, devices: tuple[str, ...], wanted: int) -> None:
        assert short(reader, f"(EngineCore pid=7) ERROR 11-23 08:46:04 [core.py:1349] {line}") == (devices, wanted)

    @pytest.mark.parametrize(
        "line",
        [
            "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 114688, Limit: 101376",
            "vllm: error: argument --gpu-memory-utilization: invalid float value: 'lots'",
            "INFO 11-23 [gpu_worker.py:563] Available KV cache memory: 6.87 GiB",
            "INFO 11-23 [gpu_worker.py:748] Initial free memory: 23.2 GiB; Requested memory: 0.9 (util), 21.3 GiB",
            "To prevent an OutOfMemory later, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
            "RuntimeError: unable to write to file </torch_7_1>: No space left on device (28)",
        ],
    )
    def test_other_lines_about_memory(self, line: str) -> None:
        fact = read_vllm(line)
        assert not (isinstance(fact, Cause) and fact.out_of_memory)

    def test_full_shared_memory_has_a_hint_of_its_own(self) -> None:
        fact = read_vllm("Error while creating shared memory segment /dev/shm/nccl-a1b2c3 (size 33030528)")
        assert isinstance(fact, Cause)
        assert "/dev/shm" in fact.text


class TestVllm:
    @pytest.mark.parametrize(
        ("line", "devices", "wanted", "words"),
        [
            (
                (
                    "ValueError: To serve at least one request with the model's max seq len "
                    "(131072), (16.0 GiB KV cache "
                    "is needed, which is larger than the available KV cache memory (6.87 GiB). Based on the available "
                    "memory, the estimated maximum model length is 56256. Try increasing"
                ),
                (),
                16 * GIB,
                "--ctx 56256",
            ),
            (
                (
                    "To serve at least one request with the models's max seq len (8192), (1.0 GiB KV cache is needed, "
                    "which is larger than the available KV cache memory (0.0 GiB). Try increasing"
                ),
                (),
                GIB,
                "smaller --ctx",
            ),
            (
                (
                    "ValueError: Free memory on device cuda:1 (19.77/22.05 GiB) on startup is less "
                    "than desired GPU memory "
                    "utilization (0.9, 20.0 GiB). Decrease"
                ),
                ("cuda:1",),
                20 * GIB,
                "only 19.77 of 22.05 GiB",
            ),
            (
                "Free memory on device (19.77/22.05 GiB) on startup is less than desired GPU memory utilization",
                (),
                0,
                "only 19.77",
            ),
            ("ValueError: No available memory for the cache blocks. Try increasing", (), 0, "cache"),
            (
                (
                    "ERROR Failed to load model - not enough GPU memory. Try lowering "
                    "--gpu-memory-utilization (original "
                    "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.6 GiB)"
                ),
                ("cuda:0",),
                2 * GIB,
                "cuda:0",
            ),
            ("Failed to load model - not enough GPU memory. Try lowering", (), 0, "a GPU"),
            ("CUDA out of memory occurred when warming up sampler with 256 dummy requests.", (), 0, "256 users"),
            ("CUDA out of memory occurred when warming up pooler with 32 dummy requests.", (), 0, "32 users"),
            ("ValueError: max_num_seqs (256) exceeds available Mamba cache blocks (3).", (), 0, "256 users"),
            ("ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve", (), 0, "a GPU"),
            (
                (
                    "ValueError: Available memory on node 0 (3.1/23.4 GiB) on startup is less than desired CPU memory "
                    "utilization (0.92, 21.0 GiB). On the CPU backend,"
                ),
                HOST,
                21 * GIB,
                "only 3.1 of 23.4 GiB of RAM",
            ),
            (
                (
                    "ValueError: Available memory on node 0 (22.0/23.4 GiB) on kv cache allocation "
                    "is less than requested "
                    "memory for kv (500.0 GiB). Decrease"
                ),
                HOST,
                500 * GIB,
                "of RAM",
            ),
        ],
    )
    def test_too_little_memory(self, line: str, devices: tuple[str, ...], wanted: int, words: str) -> None:
        assert short(read_vllm, line) == (devices, wanted)
        fact = read_vllm(line)
        assert isinstance(fact, Cause)
        assert words in f"{fact.text} {fact.hint}"

    @pytest.mark.parametrize(
        "line",
        [
            "AssertionError: Error in memory profiling. Initial free memory 20.1 GiB, current free memory 21.0 GiB",
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.",
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        ],
    )
    def test_other_failures(self, line: str) -> None:
        fact = read_vllm(line)
        assert not (isinstance(fact, Cause) and fact.out_of_memory)


class TestExLlama:
    @pytest.mark.parametrize(
        "line",
        [
            "RuntimeError: Insufficient VRAM for model and cache",
            "RuntimeError: Insufficient VRAM in split for model and cache",
            "AssertionError: Insufficient space in device allocation",
        ],
    )
    def test_its_own_words(self, line: str) -> None:
        assert short(read_exllama, line) == ((), 0)

    def test_requests_served(self) -> None:
        line = (
            "2026-08-13 20:55:45.123 INFO:     Metrics (ID: 7f3a): 90 tokens generated in 4.5 seconds (Queue: 0.5 s, "
            "Process: 0 cached tokens and 512 new tokens at 500.0 T/s, Generate: 30.0 T/s, Context: 512 tokens)"
        )
        assert read_exllama(line) == Served(n_tokens=90, seconds=3.0)

    @pytest.mark.parametrize("speed", ["Indeterminate", "0.0", "0"])
    def test_without_a_speed_it_is_all_the_time(self, speed: str) -> None:
        line = f"INFO: Metrics (ID: 7f): 1 tokens generated in 0.25 seconds (Queue: 0.0 s, Generate: {speed} T/s)"
        assert read_exllama(line) == Served(n_tokens=1, seconds=0.25)


def test_a_container_killed_for_its_memory() -> None:
    assert short(read_aikit, "docker: Error response from daemon: container init was OOM-killed") == (HOST, 0)


class TestOllama:
    @pytest.mark.parametrize(
        ("reason", "devices", "wanted"),
        [
            (
                "model requires more system memory (9.9 GiB) than is available (7.6 GiB)",
                HOST,
                int(9.9 * GIB),
            ),
            ("model requires more system memory than is currently available", HOST, 0),
            ("llama runner process has terminated: signal: killed", HOST, 0),
            ("llama-server process has terminated: signal: killed", HOST, 0),
            (
                (
                    "llama runner process has terminated: cudaMalloc failed: out of "
                    "memory\nggml_gallocr_reserve_n: failed "
                    "to allocate CUDA0 buffer of size 838447104"
                ),
                ("CUDA0",),
                838447104,
            ),
            ("llama runner process has terminated: CUDA error: out of memory", (), 0),
            (
                "llama runner process has terminated: error loading model: unable to allocate CUDA0 buffer",
                ("CUDA0",),
                0,
            ),
            ("memory layout cannot be allocated with num_gpu = 99", (), 0),
        ],
    )
    def test_answers(self, reason: str, devices: tuple[str, ...], wanted: int) -> None:
        cause = read_refusal(reason)
        assert cause is not None
        assert cause.out_of_memory
        assert (cause.devices, cause.wanted_bytes) == (devices, wanted)
        assert short(read_ollama, reason) == (devices, wanted)

    @pytest.mark.parametrize(
        "reason",
        ["llama runner process has terminated: exit status 2", "model 'x' not found", "timed out", "killed time"],
    )
    def test_other_answers(self, reason: str) -> None:
        cause = read_refusal(reason)
        assert cause is None or not cause.out_of_memory

    @pytest.mark.parametrize(
        ("reason", "kind"),
        [
            ("model requires more system memory (9.9 GiB) than is available (7.6 GiB)", OutOfMemoryError),
            ("llama runner process has terminated: exit status 2", RuntimeFailedError),
        ],
    )
    def test_a_load_that_fails(self, reason: str, kind: type[RuntimeFailedError]) -> None:
        with pytest.raises(RuntimeFailedError) as caught:
            _refuse(reason)
        assert type(caught.value) is kind
        assert reason in caught.value.message
        if isinstance(caught.value, OutOfMemoryError):
            assert (caught.value.devices, caught.value.wanted_bytes) == (HOST, int(9.9 * GIB))


def _refuse(reason: str) -> None:
    """An Ollama that takes everything but the request to load."""
    wish = Wish(
        name="mgpu-m:1", stem="mgpu-m", alias="m", paths=(), file_bytes=1, parameters={}, ctx=8192, card_bytes=GIB,
        on_cards=True, copies=1,
    )  # fmt: skip
    talk = OllamaAttachment("http://127.0.0.1:11434", wish, local=True).begin()
    event = next(talk)
    for _ in range(20):
        if isinstance(event, Call) and event.url.endswith("/generate"):
            event = talk.send(Answer(status=500, body={"error": reason}))
        elif isinstance(event, Call | More):
            event = talk.send(Answer(status=200, body={"status": "success"}, end=isinstance(event, More)))
        else:
            event = talk.send(None)


#: What b11434 answered after one request of 20 tokens, shortened.
LLAMACPP_METRICS: Final = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 4
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 20
llamacpp:tokens_predicted_seconds_total 0.242316
llamacpp:predicted_tokens_seconds 78.41
llamacpp:requests_processing 1
llamacpp:requests_deferred 3
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 7
"""


VLLM_METRICS: Final = """\
vllm:num_requests_running{engine="0",model_name="tiny"} 1.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 9.0
vllm:generation_tokens_total{engine="0",model_name="tiny"} 36.0
vllm:request_generation_tokens_sum{engine="0",model_name="tiny"} 12.0
vllm:request_decode_time_seconds_sum{engine="0",model_name="tiny"} 0.22
"""


class TestMetrics:
    def test_llamacpp(self) -> None:
        stats = read_llamacpp_metrics(LLAMACPP_METRICS)
        assert stats == Stats(running=1, waiting=3, generated=20, generating_s=0.242316)

    def test_six_digits(self) -> None:
        stats = read_llamacpp_metrics("llamacpp:tokens_predicted_total 1.23457e+08")
        assert stats == Stats(generated=123457000)

    def test_vllm(self) -> None:
        stats = read_vllm_metrics(VLLM_METRICS)
        assert stats is not None
        assert (stats.running, stats.waiting, stats.generated) == (1, 2, 36)
        assert stats.generating_s == pytest.approx(0.66)

    def test_engines_are_summed_whatever_the_model_is_called(self) -> None:
        name = 'a"} vllm:num_requests_running{x=\\" 9 {}\\"'
        text = "".join(f'vllm:num_requests_running{{engine="{engine}",model_name="{name}"}} 2.0\n' for engine in "01")
        assert read_vllm_metrics(text) == Stats(running=4)

    @pytest.mark.parametrize(
        "text",
        ["", "{}", "404 page not found", '{"error": {"code": 501}}', "llamacpp:requests_processing", "\0" * 100,
         "llamacpp:requests_processing nan", "llamacpp:requests_processing -1", "llamacpp:requests_processing 1e300",
         "llamacpp:requests_processing " + "9" * 10_000, "llamacpp:requests_processing{ 1"],
    )  # fmt: skip
    def test_what_is_none(self, text: str) -> None:
        assert read_llamacpp_metrics(text) is None
        assert read_vllm_metrics(text) is None

    @given(st.text(alphabet=st.sampled_from('llamacpp:vllm_requests{}"=\\ 0123456789.e+-naif\n#')))
    @settings(max_examples=500)
    def test_no_text_raises(self, text: str) -> None:
        for prefix in ("llamacpp:requests_processing", "vllm:generation_tokens_total"):
            read_llamacpp_metrics(prefix + text)
            read_vllm_metrics(prefix + text)

    def test_a_gigantic_answer_is_bounded(self) -> None:
        text = LLAMACPP_METRICS + "llamacpp:requests_processing 1\n" * 2_000_000
        started = time.process_time()
        stats = read_llamacpp_metrics(text)
        assert time.process_time() - started < 2
        assert stats is not None
        assert stats.generated == 20


#: Words that the readers look for, to be put together at random.
PIECES: Final = (
    "failed to allocate ", "unable to allocate ", " buffer of size ", " buffer size = ", "out of memory", "model ",
    "allocating 1.00 MiB on device ", ": cudaMalloc failed: ", "eval time = ", " ms / ", " tokens", "prompt ",
    "CUDA out of memory. Tried to allocate ", "GPU 1", " has", "Free memory on device ", "cuda:0 ", "(1/2 GiB)",
    " on startup is less than desired", "max seq len (1), (", " GiB KV cache is needed", "memory (", " GiB)",
    "estimated maximum model length is ", "Metrics (ID: ", "tokens generated in ", " seconds", "Generate: ", " T/s",
    "requires more system memory (", ") than is available", "process has terminated: ", "killed", "Worker pid=1) ",
    "distributed_init_method=file:///tmp/vllm_dist_", "0" * 32, "(Worker", "error: invalid argument: ", "port: ",
    "couldn't bind HTTP server socket", "nvidia-container-cli: ", "unresolvable CDI devices ", "Worker proc ",
    " died unexpectedly (exit code: ", "The quantization method ", "std::bad_alloc", "/dev/shm/", "{0}", "{", "}",
    "Model architectures [", "] are not supported", "1", "9" * 20, ".", "-", " ", "\t", "\0", "é",
    "\ud800", "MiB", "GiB",
)  # fmt: skip


class TestAnyLine:
    @pytest.mark.parametrize("name", READERS)
    @given(line=st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=30).map("".join))
    @settings(max_examples=400, deadline=None)
    @example(line="")
    def test_none_raises(self, name: str, line: str) -> None:
        fact = READERS[name](line)
        if isinstance(fact, Cause):
            assert fact.wanted_bytes >= 0
            assert fact.out_of_memory or not (fact.devices or fact.wanted_bytes)
        if isinstance(fact, Served):
            assert fact.n_tokens >= 0
            assert 0 <= fact.seconds < 1e12

    @pytest.mark.parametrize("name", READERS)
    def test_a_megabyte_of_any_piece_takes_no_time(self, name: str) -> None:
        """Patterns that try every way to match would take minutes, not seconds."""
        started = time.process_time()
        for piece in PIECES:
            READERS[name](piece * (1024 * 1024 // len(piece)))
            READERS[name](f"x{piece}" * 400)
        assert time.process_time() - started < 6
