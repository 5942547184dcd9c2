"""Where customers may send us: public addresses alone, however they are spelt, and the one that was looked at."""

import ipaddress
import socket
import threading
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from shared.config import Webhooks
from shared.egress import check_url, is_public, reach_of_webhooks, resolve
from shared.errors import AddressRefused

PUBLIC = "93.184.215.14"
PUBLIC_WEB = reach_of_webhooks(Webhooks(schemes=("https", "http")))
ANYWHERE = reach_of_webhooks(Webhooks(allow_private_addresses=True))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "93.184.215.14", "172.15.0.1", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450:4001::8a"],
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.255", "168.63.129.16",  # noqa: S104
        "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1",
        "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1",
        "100::1", "2001::1", "2001:2::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1",
        "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1",
    ],
)  # fmt: skip
def test_an_address_that_is_nobodys_server_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@hypothesis.given(st.ip_addresses(v=4))
def test_no_ipv4_address_hides_in_an_ipv6_one(inner: ipaddress.IPv4Address) -> None:
    number = int(inner)
    for outer in (
        int(ipaddress.IPv6Address("::ffff:0:0")) | number,
        int(ipaddress.IPv6Address("::")) | number,
        int(ipaddress.IPv6Address("64:ff9b::")) | number,
        int(ipaddress.IPv6Address("2002::")) | number << 80,
        int(ipaddress.IPv6Address("2001::")) | number ^ 0xFFFFFFFF,
    ):
        assert not is_public(ipaddress.IPv6Address(outer))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://127.0.0.1",
        "ftp://8.8.8.8",
        "data:text/plain,x",
        "http://127.0.0.1",
        "http://2130706433",
        "http://0x7f000001",
        "http://0177.0.0.1",
        "http://127.1",
        "http://localhost",
        "http://localhost.",
        "http://LOCALHOST",
        "http://[::1]",
        "http://[::ffff:127.0.0.1]",
        "http://[2002:7f00:1::]",
        "http://[fe80::1%25eth0]",
        "http://169.254.169.254/latest/meta-data",
        "http://[fd00:ec2::254]",
        "http://168.63.129.16",
        "http://0.0.0.0",
        "http://0",
        "http://user:pass@8.8.8.8",
        "http://good\\@127.0.0.1/",
        "http://１２７.0.0.1",
        "http://①②⑦.0.0.1",
        "http://",
        "http://8.8.8.8:22",
        "http://8.8.8.8:6379",
        "http://8.8.8.8:8080",
        "https://8.8.8.8:80443",
    ],
)
def test_a_url_that_leads_anywhere_else_is_refused(url: str) -> None:
    with pytest.raises((AddressRefused, OSError, ValueError)):
        resolve(url, PUBLIC_WEB)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://8.8.8.8", "8.8.8.8"),
        ("https://8.8.8.8:443/hook?a=b", "8.8.8.8"),
        ("https://8.8.8.8:80", "8.8.8.8"),
        ("https://[2606:4700:4700::1111]/", "2606:4700:4700::1111"),
    ],
)
def test_a_url_that_leads_to_the_public_is_resolved(url: str, address: str) -> None:
    assert resolve(url, PUBLIC_WEB)[1] == address


def test_where_private_addresses_are_allowed_any_port_is() -> None:
    assert resolve("http://127.0.0.1:8123/hook", ANYWHERE)[1] == "127.0.0.1"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1", "http://user@127.0.0.1", "http://"])
def test_where_private_addresses_are_allowed_other_urls_are_still_refused(url: str) -> None:
    with pytest.raises(AddressRefused):
        resolve(url, ANYWHERE)


class Names:
    """Somebody else's name server, which may answer differently every time."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)

    def look_up(self, _host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in self._answers.pop(0)
        ]  # fmt: skip


@pytest.mark.parametrize("addresses", [[PUBLIC, "127.0.0.1"], ["10.0.0.1", PUBLIC], [PUBLIC, PUBLIC, "::1"]])
def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names(addresses).look_up)
    with pytest.raises(AddressRefused):
        resolve("https://both.example", PUBLIC_WEB)


def test_a_name_is_looked_up_once_so_that_its_answer_cannot_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names([PUBLIC], ["127.0.0.1"]).look_up)
    assert resolve("https://rebinding.example", PUBLIC_WEB)[1] == PUBLIC


def test_a_name_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [] if silent.wait(20) else None)
    with pytest.raises(TimeoutError, match="looked up"):
        resolve("https://silent.example", PUBLIC_WEB, seconds=0.01)
    assert not silent.is_set()
    silent.set()


def given(**settings: Any) -> Webhooks:
    return Webhooks.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "https://receiver.example/hook"),
        ({"ports": [8443]}, "https://receiver.example:8443"),
        ({"schemes": ["https", "http"]}, "http://receiver.example"),
        ({"schemes": ["http"], "ports": [8080]}, "http://receiver.example:8080"),
        ({"private_networks": ["10.1.0.0/16"]}, "https://10.1.2.3"),
        ({"private_networks": ["fd00:1::/32"]}, "https://[fd00:1::2]"),
        ({"allow_private_addresses": True}, "http://10.2.2.3:8123"),
    ],
)
def test_a_receiver_within_the_settings_may_be_named(settings: dict[str, Any], url: str) -> None:
    assert check_url(url, reach_of_webhooks(given(**settings))).geturl() == url


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://receiver.example"),
        ({}, "https://receiver.example:8443"),
        ({}, "https://10.1.2.3"),
        ({"ports": [8443]}, "https://receiver.example"),
        ({"schemes": ["http"]}, "https://receiver.example"),
        ({"schemes": ["https", "http"]}, "http://receiver.example:8080"),
        ({"private_networks": ["10.1.0.0/16"]}, "https://10.2.2.3"),
        ({"private_networks": ["10.1.0.0/16"]}, "https://10.1.2.3:8443"),
        ({"schemes": ["https"], "allow_private_addresses": True}, "http://10.2.2.3"),
    ],
)
def test_a_receiver_beyond_the_settings_is_refused_before_any_look_up(settings: dict[str, Any], url: str) -> None:
    with pytest.raises(AddressRefused):
        check_url(url, reach_of_webhooks(given(**settings)))


def test_a_name_may_lead_into_a_network_that_is_allowed_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names(["10.1.0.9"], ["10.1.0.9", "10.2.0.9"]).look_up)
    reach = reach_of_webhooks(given(private_networks=["10.1.0.0/16"]))
    assert resolve("https://inside.example", reach)[1] == "10.1.0.9"
    with pytest.raises(AddressRefused):
        resolve("https://inside.example", reach)
