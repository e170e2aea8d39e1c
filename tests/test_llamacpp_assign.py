"""Layer to device, against splits that real llama.cpp b11434 printed, and as a property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu_adapters.llamacpp.assign import assign


@pytest.mark.parametrize(
    ("tensor_split", "n_units", "counts"),
    [
        # Blocks per device as llama.cpp b11434 loaded Llama-3.1-8B (32 blocks); the last count includes the output.
        pytest.param((1, 1), 33, (17, 16), id="1,1"),
        pytest.param((3, 1), 33, (25, 8), id="3,1"),
        pytest.param((2, 1, 1), 33, (17, 8, 8), id="2,1,1"),
        pytest.param((4, 3, 2, 1), 33, (14, 10, 6, 3), id="4,3,2,1"),
        pytest.param((1, 1, 1, 1), 33, (9, 8, 8, 8), id="1,1,1,1"),
        pytest.param((0, 1), 33, (0, 33), id="nothing on the first"),
        pytest.param((1, 0), 33, (33, 0), id="nothing on the last"),
        pytest.param((10, 9), 19, (10, 9), id="gemma-3-270m 10,9"),
    ],
)
def test_as_llama_cpp_does(tensor_split: tuple[float, ...], n_units: int, counts: tuple[int, ...]) -> None:
    assert assign(tensor_split, n_units) == counts


def test_host_layers_are_outside_of_the_proportions() -> None:
    assert assign((1, 1), 33, host_layers=13) == (10, 10)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=15).filter(any))
def test_whole_layer_numbers_give_exactly_these_layers(counts: list[int]) -> None:
    """What mgpu prints: counts that sum to the number of units are what the runtime then makes of them."""
    assert assign(tuple(counts), sum(counts)) == tuple(counts)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=15).filter(lambda split: sum(split) > 1e-3), st.integers(1, 200)
)
def test_every_unit_goes_somewhere(tensor_split: list[float], n_units: int) -> None:
    counts = assign(tuple(tensor_split), n_units)
    assert sum(counts) == n_units
    assert len(counts) == len(tensor_split)
