"""By which address others reach this host."""

import pytest

from skippipe.membership.addresses import own_address


def test_address_is_that_on_the_way_to_the_master_or_of_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address("127.0.0.1", 29500) == "127.0.0.1"
    assert own_address("::1", 29500) == "::1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address("192.0.2.1", 29500) == "127.0.0.1"
