"""Flags after `--`: what they mean for the plan, and what is refused."""

from __future__ import annotations

import pytest

from mgpu.errors import UsageError
from mgpu_adapters.llamacpp.flags import read_flags


def test_known_flags_in_every_spelling() -> None:
    given = read_flags(("-c", "4096", "--n_gpu_layers", "20", "-ts", "3/1", "-kvu", "-ot", "exps=CPU,ffn_up.*=CUDA1"))
    assert given.integer("ctx-size", least=0) == 4096
    assert given.gpu_layers() == 20
    assert given.tensor_split() == (3.0, 1.0)
    assert "kv-unified" in given
    assert given.overrides() == (("exps", "CPU"), ("ffn_up.*", "CUDA1"))


def test_the_last_of_a_kind_counts() -> None:
    assert read_flags(("-c", "1", "--ctx-size", "2")).integer("ctx-size", least=0) == 2


def test_unknown_flags_and_their_values_are_left_alone() -> None:
    given = read_flags(("--temp", "0.1", "-s", "-1", "--jinja", "-b", "64"))
    assert dict(given.values) == {"batch-size": "64"}


@pytest.mark.parametrize(("value", "layers"), [("auto", None), ("all", -1), ("-1", -1), ("0", 0), ("7", 7)])
def test_gpu_layers(value: str, layers: int | None) -> None:
    assert read_flags(("-ngl", value)).gpu_layers() == layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("--port", "1"), "bypass mgpu", id="port is mgpu's"),
        pytest.param(("-m", "x.gguf"), "bypass mgpu", id="model is mgpu's"),
        pytest.param(("-c",), "lacks its value", id="no value"),
    ],
)
def test_refused_at_once(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_flags(arguments)


def test_values_that_mean_nothing_name_the_flag_and_the_value() -> None:
    with pytest.raises(UsageError, match="--ctx-size 'big'"):
        read_flags(("-c", "big")).integer("ctx-size", least=0)
    with pytest.raises(UsageError, match="--batch-size '0'"):
        read_flags(("-b", "0")).integer("batch-size", least=1)
    with pytest.raises(UsageError, match="--batch-size '1_0'"):
        read_flags(("-b", "1_0")).integer("batch-size", least=1)
    with pytest.raises(UsageError, match="--override-tensor"):
        read_flags(("-ot", "(=CPU")).overrides()
    with pytest.raises(UsageError, match="--cache-type-k 'q9'"):
        read_flags(("-ctk", "q9")).kv_type("cache-type-k", "f16")


@pytest.mark.parametrize(
    "value", ["", "1,,2", "a,b", "-1,2", "0,0", "nan,1", "inf,1", "1e300,1e300", ",".join("1" * 16)]
)
def test_tensor_split_that_is_none(value: str) -> None:
    with pytest.raises(UsageError, match="--tensor-split"):
        read_flags(("-ts", value)).tensor_split()
