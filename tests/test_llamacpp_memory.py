"""Memory by llama.cpp's own figures: to the byte for weights and cache, and within what was achieved for the graph."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.model import Model, Tensor
from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu.units import GIB, MIB
from mgpu_adapters.llamacpp.memory import Footprint, footprint
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.traits import traits_of
from oracle import (
    TABLES,
    Answer,
    Golden,
    Logged,
    Table,
    answers,
    footprint_of,
    goldens,
    gpu_of,
    logs,
    model_names,
    model_of,
    small_model,
)

#: Every n-th configuration is asked for its compute buffers here; benchmarks/memory_accuracy.py asks for all.
STEP = 7

names = st.sampled_from(model_names())


def sampled(table: Table) -> list[Answer]:
    return [answer for golden in goldens(table)[::STEP] for answer in answers(golden)]


@pytest.mark.parametrize("table", TABLES)
def test_weights_and_cache_to_the_byte(table: Table) -> None:
    wrong = [golden for golden in goldens(table) if _stored(golden) != _really_stored(golden)]
    assert wrong == []


def _stored(golden: Golden) -> list[tuple[int, int]]:
    need = footprint_of(golden.model).with_settings(golden.settings)
    gpus = golden.gpus()
    sizes = [
        (need.device_weights(span, golden.shape, gpus[device]), need.device_kv(span, gpus[device]))
        for device, span in golden.spans()
    ]
    return [*sizes, (need.host_weights(golden.shape, gpus), need.host_kv(golden.shape, gpus))]


def _really_stored(golden: Golden) -> list[tuple[int, int]]:
    used = [golden.devices[device] for device, _ in golden.spans()]
    return [sizes[:2] for sizes in (*used, golden.host) if sizes is not None]


@pytest.mark.parametrize("table", TABLES)
def test_totals_are_what_llama_cpp_reserves(table: Table) -> None:
    errors = sorted(answer.error for answer in sampled(table))
    exact = sum(error == 0 for error in errors) / len(errors)
    assert statistics.median(errors) == 0
    assert exact > 0.99
    assert errors[0] > -0.001
    assert errors[-1] < 0.0075


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", model_names())
def test_every_model_whole_on_one_device(table: Table, name: str) -> None:
    golden = next(golden for golden in goldens(table) if golden.model == name)
    assert golden.counts == (model_of(name).hyper.n_layer + 1,)
    for answer in answers(golden):
        assert answer.predicted == answer.real


def _figures(logged: Logged) -> Iterator[tuple[float | None, float]]:
    """Logged and predicted, in MiB, of each buffer of each device."""
    need = footprint(small_model(logged.model), logged.settings)
    gpus = tuple(gpu_of("rpc", device) for device in range(len(logged.counts)))
    start, said = logged.shape.host_layers, list[tuple[int, int, int]]()
    for gpu, count in zip(gpus, logged.counts, strict=True):
        device = need.device(range(start, start + count), logged.shape, gpu)
        said.append((device.weights, device.kv, device.compute))
        start += count
    host = need.host(logged.shape, gpus)
    said.append((host.weights, host.kv, host.compute))
    for real, predicted in zip(logged.devices, said, strict=True):
        yield from ((mib, size / MIB) for mib, size in zip(real, predicted, strict=True))


@pytest.mark.parametrize("name", sorted({logged.model for logged in logs()}))
def test_further_architectures_as_logged(name: str) -> None:
    """Real loads of small models: to what the log shows, and a little more where the graph is only like a Llama's."""
    supported = traits_of(small_model(name).architecture).supported
    within = 0.0045 if supported else 0.0  # of grovemoe and gemma4, one buffer in a split or on both sides
    for logged in logs():
        for real, said in _figures(logged) if logged.model == name else ():
            if real is not None:
                assert said >= real * (1 - within) - 0.021
                assert said <= real * (1.09 if supported else 6) + 0.021


class TestSplits:
    """The parts of a split and what they add up to."""

    @given(name=names, data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_parts_add_up(self, name: str, data: st.DataObject) -> None:
        need = footprint_of(name)
        cuts = data.draw(st.lists(st.integers(1, need.n_units - 1), max_size=3, unique=True).map(sorted))
        edges = [0, *cuts, need.n_units]
        spans = [range(start, stop) for start, stop in pairwise(edges)]
        shape, gpu = Shape(n_devices=len(spans)), gpu_of("cuda")
        whole = range(need.n_units)
        copies = sum(span.start < need.n_units - 1 for span in spans) - 1
        repeated = _bytes_everywhere(model_of(name)) * copies
        parts = [need.device(span, shape, gpu) for span in spans]
        assert sum(part.weights for part in parts) == need.device_weights(whole, shape, gpu) + repeated
        assert sum(part.kv for part in parts) == need.device_kv(whole, gpu)
        assert all(part.total == part.weights + part.kv + part.compute + part.overhead for part in parts)

    @given(name=names, data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_more_layers_never_need_less(self, name: str, data: st.DataObject) -> None:
        need = footprint_of(name)
        start = data.draw(st.integers(0, need.n_units - 2))
        stop = data.draw(st.integers(start + 1, need.n_units - 1))
        shape, gpu = (
            Shape(n_devices=data.draw(st.integers(1, 4)), host_layers=data.draw(st.integers(0, start))),
            gpu_of("cuda"),
        )
        less, more = (need.device(range(start, end), shape, gpu) for end in (stop, stop + 1))
        assert more.weights >= less.weights
        assert more.kv >= less.kv
        assert more.total >= less.total

    @given(name=names, ctx=st.integers(1, 60), step=st.integers(1, 60), users=st.integers(1, 4))
    @settings(max_examples=60, deadline=None)
    def test_more_context_never_needs_less(self, name: str, ctx: int, step: int, users: int) -> None:
        gpu, shape = gpu_of("rpc"), Shape(n_devices=1)
        contexts = (512 * ctx * users, 512 * (ctx + step) * users)
        less, more = (_need(name, n_ctx=n_ctx, n_parallel=users) for n_ctx in contexts)
        span = range(less.n_units)
        assert more.device(span, shape, gpu).total >= less.device(span, shape, gpu).total
        assert more.host(shape, (gpu,)).total >= less.host(shape, (gpu,)).total

    @given(name=names, users=st.integers(1, 7), ctx=st.integers(1, 16))
    @settings(max_examples=60, deadline=None)
    def test_more_users_never_need_less_cache(self, name: str, users: int, ctx: int) -> None:
        gpu = gpu_of("rpc")
        less, more = (_need(name, n_ctx=1024 * ctx * n, n_parallel=n) for n in (users, users + 1))
        span = range(less.n_units)
        assert more.device_kv(span, gpu) >= less.device_kv(span, gpu)

    @given(name=names, users=st.sampled_from([1, 2, 4]), ctx=st.integers(1, 16), shared=st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_twice_the_users_never_need_less(self, name: str, users: int, ctx: int, shared: bool) -> None:
        """In all. A number of users that the batch is no multiple of makes for a smaller batch: up to 3 MiB less."""
        gpu, shape = gpu_of("rpc"), Shape(n_devices=1)
        numbers = (users, 2 * users)
        less, more = (
            _need(name, n_ctx=1024 * ctx * (8 if shared else n), n_parallel=n, kv_unified=shared) for n in numbers
        )
        span = range(less.n_units)
        assert more.device(span, shape, gpu).total >= less.device(span, shape, gpu).total
        assert more.host(shape, (gpu,)).total >= less.host(shape, (gpu,)).total


def _need(name: str, **flags: int) -> Footprint:
    return footprint_of(name).with_settings(Settings(**flags))  # type: ignore[arg-type]  # integers alone are passed


def _bytes_everywhere(model: Model) -> int:
    """What each device holds a copy of: rotary factors."""
    return sum(-(-tensor.n_bytes // 128) * 128 for tensor in model.tensors if tensor.name.startswith("rope_f"))


class TestHost:
    """What stays on the host, by each of the ways to keep it there."""

    model = "Qwen3-30B-A3B-Q4_K_M"

    @given(n=st.integers(0, 48))
    @settings(deadline=None)
    def test_experts_move_from_device_to_host(self, n: int) -> None:
        need, gpu = footprint_of(self.model), gpu_of("rpc")
        none, some = Shape(n_devices=1), Shape(n_devices=1, host_experts=n)
        span = range(need.n_units)
        moved = sum(
            -(-tensor.n_bytes // 32) * 32
            for tensor in model_of(self.model).tensors
            if tensor.kind == "expert" and (tensor.layer or 0) < n
        )
        assert need.device_weights(span, none, gpu) - need.device_weights(span, some, gpu) == moved
        assert need.host_weights(some, (gpu,)) - need.host_weights(none, (gpu,)) == moved

    def test_overrides_are_honoured(self) -> None:
        gpu, shape = gpu_of("cuda"), Shape(n_devices=1)
        pattern = r"blk\.[0-9]\.ffn_(up|down|gate)_exps"
        by_pattern = _with(self.model, override_tensor=((pattern, "CPU"),))
        by_number = _with(self.model, n_cpu_moe=10)
        span = range(by_number.n_units)
        assert by_pattern.device(span, shape, gpu) == by_number.device(span, shape, gpu)
        assert by_pattern.host(shape, (gpu,)) == by_number.host(shape, (gpu,))

    def test_first_override_wins(self) -> None:
        gpu, shape = gpu_of("cuda"), Shape(n_devices=1)
        kept = _with(self.model, override_tensor=(("exps", "CUDA0"), ("ffn", "CPU")))
        span = range(kept.n_units)
        all_ = footprint_of(self.model)
        experts = sum(t.n_bytes for t in model_of(self.model).tensors if t.kind == "expert")
        assert experts < kept.device_weights(span, shape, gpu) < all_.device_weights(span, shape, gpu)

    def test_everything_without_devices(self) -> None:
        need = footprint_of(self.model)
        host = need.host(Shape(n_devices=0, host_layers=need.n_units), ())
        stored = sum(-(-tensor.n_bytes // 32) * 32 for tensor in model_of(self.model).tensors)
        assert host.weights == stored
        assert host.kv == need.device_kv(range(need.n_units), gpu_of("rpc"))
        assert host.compute > 0

    def test_cache_kept_on_the_host(self) -> None:
        need, gpu, shape = _with(self.model, kv_offload=False), gpu_of("cuda"), Shape(n_devices=1)
        assert need.device_kv(range(need.n_units), gpu) == 0
        assert need.host_kv(shape, (gpu,)) == footprint_of(self.model).device_kv(range(need.n_units), gpu)


def _with(name: str, **changes: object) -> Footprint:
    return footprint_of(name).with_settings(replace(Settings(n_ctx=4096), **changes))


class TestTensorsTooLarge:
    """Vulkan: a tensor beyond the largest storage buffer stays on the host."""

    name = "gemma-3-4b-it-Q4_K_M"

    def test_tied_output_is_not_copied(self) -> None:
        need = footprint_of(self.name)
        embedding = next(tensor for tensor in model_of(self.name).tensors if tensor.name == "token_embd.weight")
        large = Gpu(index=0, name="v", vendor="unknown", device="Vulkan0", total_bytes=GIB, free_bytes=GIB)
        small = replace(large, max_tensor_bytes=embedding.n_bytes - 1)
        span, shape = range(need.n_units), Shape(n_devices=1)
        spared = need.device_weights(span, shape, large) - need.device_weights(span, shape, small)
        assert spared == embedding.n_bytes
        assert need.host_weights(shape, (small,)) == need.host_weights(shape, (large,))

    def test_untied_output_stays_on_the_host(self) -> None:
        name = "Llama-3.1-8B-Instruct-Q4_K_M"
        need = footprint_of(name)
        output = next(tensor for tensor in model_of(name).tensors if tensor.name == "output.weight")
        large = Gpu(index=0, name="v", vendor="unknown", device="Vulkan0", total_bytes=GIB, free_bytes=GIB)
        small = replace(large, max_tensor_bytes=output.n_bytes - 1)
        span, shape = range(need.n_units), Shape(n_devices=1)
        assert need.device_weights(span, shape, large) - need.device_weights(span, shape, small) == output.n_bytes
        assert need.host_weights(shape, (small,)) - need.host_weights(shape, (large,)) == output.n_bytes


class TestUnknownArchitecture:
    """Never refused: drawn as a Llama where that can be, estimated where not, with a margin."""

    def test_like_a_llama_with_a_margin(self) -> None:
        name = "Llama-3.1-8B-Instruct-Q4_K_M"
        known = footprint_of(name)
        unknown = footprint(_renamed(model_of(name), "llama", "brandnew"), Settings(n_ctx=4096))
        gpu, shape, span = gpu_of("cuda"), Shape(n_devices=1), range(known.n_units)
        real, said = known.device(span, shape, gpu), unknown.device(span, shape, gpu)
        assert (said.weights, said.kv) == (real.weights, real.kv)
        assert said.compute == pytest.approx(real.compute * 1.25, rel=1e-6)

    @pytest.mark.parametrize("n_devices", [1, 2])
    def test_strange_blocks_are_estimated(self, n_devices: int) -> None:
        model = _renamed(model_of("Qwen3-30B-A3B-Q4_K_M"), "qwen3moe", "brandnew")
        strange = replace(model, tensors=tuple(_strange(tensor) for tensor in model.tensors))
        need, gpu = footprint(strange, Settings(n_ctx=4096)), gpu_of("cuda")
        shape = Shape(n_devices=n_devices)
        real = footprint_of("Qwen3-30B-A3B-Q4_K_M").device(range(need.n_units), shape, gpu)
        said = need.device(range(need.n_units), shape, gpu)
        assert real.compute <= said.compute < 4 * real.compute
        assert need.host(shape, (gpu,) * n_devices).compute > 0


def _renamed(model: Model, old: str, new: str) -> Model:
    metadata = {key.replace(f"{old}.", f"{new}.", 1): value for key, value in model.metadata.items()}
    return replace(model, architecture=new, metadata=metadata)


def _strange(tensor: Tensor) -> Tensor:
    return replace(tensor, name=tensor.name.replace("attn_q.", "mixer."))


class TestOverhead:
    """Outside of llama.cpp's buffers."""

    def test_larger_cards_have_larger_contexts(self) -> None:
        need, shape = footprint_of("Qwen3-8B-Q4_K_M"), Shape(n_devices=1)
        span = range(need.n_units)
        cards = [replace(gpu_of("cuda"), total_bytes=n * GIB) for n in (8, 12, 16, 24, 32, 80)]
        sizes = [need.device(span, shape, card).overhead for card in cards]
        assert sizes == sorted(sizes)
        assert 250 * MIB < sizes[0] < sizes[-1] < GIB

    def test_a_device_by_its_name_is_no_cuda(self) -> None:
        need, shape = footprint_of("Qwen3-8B-Q4_K_M"), Shape(n_devices=1)
        span = range(need.n_units)
        card = replace(gpu_of("cuda"), device=None)
        vulkan = replace(card, device="Vulkan0")
        assert need.device(span, shape, vulkan).overhead < need.device(span, shape, card).overhead


class TestWork:
    """Bytes read for one token."""

    def test_of_experts_only_those_used(self) -> None:
        name = "Qwen3-30B-A3B-Q4_K_M"
        need, model = footprint_of(name), model_of(name)
        work = need.work(need.settings.n_ctx_seq // 2, None)
        experts = sum(tensor.n_bytes for tensor in model.tensors if tensor.kind == "expert")
        others = sum(t.n_bytes for t in model.tensors if t.kind not in ("expert", "token_embedding"))
        assert work.experts[-1] == pytest.approx(experts * 8 / 128, rel=1e-9)
        assert work.weights[-1] == pytest.approx(others, rel=1e-9)
        assert work.cache[-1] == need.device_kv(range(need.n_units), gpu_of("rpc")) // 2

    @given(name=names)
    @settings(max_examples=40, deadline=None)
    def test_grows_from_unit_to_unit(self, name: str) -> None:
        need = footprint_of(name)
        work = need.work(512, None)
        sums = (work.weights, work.experts, work.unpack, work.cache, work.heads, work.layers, work.flops)
        assert {len(each) for each in sums} == {need.n_units + 1}
        assert all(each[0] == 0 and list(each) == sorted(each) for each in sums)
        assert 0 < work.layers[-1] < 6 * (need.n_units - 1)
