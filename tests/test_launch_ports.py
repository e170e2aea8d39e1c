"""Ports: really bindable, from 8080 up, and a clear word about one that is not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from mgpu.errors import RuntimeFailedError, UsageError
from mgpu.launch.ports import free_port, is_free


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def test_takes_the_first_free_one_above_a_taken_one(listener: socket.socket) -> None:
    taken = port_of(listener)
    chosen = free_port("127.0.0.1", start=taken)
    assert taken < chosen < taken + 100
    socket.create_server(("127.0.0.1", chosen)).close()


def test_a_wanted_port_that_is_free_is_given(listener: socket.socket) -> None:
    port = port_of(listener)
    listener.close()
    assert free_port("127.0.0.1", wanted=port) == port


def test_a_wanted_port_in_use_names_its_holder(listener: socket.socket) -> None:
    port = port_of(listener)
    with pytest.raises(RuntimeFailedError, match=f"port {port} on 127.0.0.1 is in use by .*pid {os.getpid()}") as error:
        free_port("127.0.0.1", wanted=port)
    assert "--port" in error.value.hint


def test_a_listener_on_all_addresses_takes_the_port_everywhere() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert not is_free("127.0.0.1", port_of(server))


def test_connections_in_time_wait_do_not_take_a_port(listener: socket.socket) -> None:
    port = port_of(listener)
    client = socket.create_connection(("127.0.0.1", port))
    connection, _ = listener.accept()
    connection.close()  # the side that closes first is left in TIME_WAIT
    client.close()
    listener.close()
    assert is_free("127.0.0.1", port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = port_of(server)
        assert not is_free("::1", port)
        assert not is_free("localhost", port) or "::1" not in _names("localhost")
        assert is_free("127.0.0.1", port)
        assert free_port("::1", start=port) > port


def _names(host: str) -> set[str]:
    return {str(address[0]) for *_, address in socket.getaddrinfo(host, 0)}


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "", "a" * 64, "1.2.3.4.5"])
def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(UsageError) as error:
        free_port(host, wanted=8080)
    assert repr(host).strip("'") in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_that_is_none(port: int) -> None:
    with pytest.raises(UsageError, match=str(port)):
        free_port("127.0.0.1", wanted=port)


def test_no_port_left() -> None:
    with pytest.raises(RuntimeFailedError, match="no free port"):
        free_port("127.0.0.1", start=65536)
