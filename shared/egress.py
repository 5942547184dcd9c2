"""Calls that the service makes on a customer's word: to public addresses alone, checked once and then dialled, and
over in a given time."""

import functools
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

import httpx2

from shared.config import Fetch, Webhooks
from shared.errors import AddressRefused

IPv4or6 = ipaddress.IPv4Address | ipaddress.IPv6Address
IPv4or6Network = ipaddress.IPv4Network | ipaddress.IPv6Network
WEB_PORTS = {"https": 443, "http": 80}

# What `is_global` of the standard library lets through although nobody's server is there, or the cloud's own is.
_DENIED = tuple(
    ipaddress.ip_network(each)
    for each in (
        "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "224.0.0.0/4",
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
)  # fmt: skip
_IPV6_PUBLIC = ipaddress.ip_network("2000::/3")
LOOK_UP_SECONDS = 5.0
UNREACHABLE = (OSError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError)
"""What a call raises when there is no answer, or no end of it."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Where a call may go."""

    schemes: frozenset[str]
    ports: frozenset[int] | None
    """None: any."""
    private: bool
    networks: tuple[IPv4or6Network, ...] = ()
    """Besides public addresses, where not all private ones are allowed."""

    def covers(self, address: IPv4or6) -> bool:
        return self.private or is_public(address) or any(address in each for each in self.networks)


def reach_of_webhooks(settings: Webhooks) -> Reach:
    private = settings.allow_private_addresses
    schemes = settings.schemes or (("https", "http") if private else ("https",))
    ports = settings.ports or (None if private else tuple(WEB_PORTS[each] for each in schemes))
    return Reach(
        schemes=frozenset(schemes), ports=None if ports is None else frozenset(ports), private=private,
        networks=settings.private_networks,
    )  # fmt: skip


def reach_of_fetch(settings: Fetch) -> Reach:
    private = settings.allow_private_addresses
    return Reach(
        schemes=frozenset(WEB_PORTS if private else ("https",)),
        ports=None if private else frozenset(WEB_PORTS.values()), private=private,
    )  # fmt: skip


def check_url(url: str, reach: Reach) -> SplitResult:
    """Its parts; raises AddressRefused for all that can be told without looking its name up."""
    parts = urlsplit(url)
    if parts.scheme not in WEB_PORTS or not parts.hostname or parts.username is not None:
        raise AddressRefused("only http and https URLs with a host and no user name are called")
    if parts.scheme not in reach.schemes:
        raise AddressRefused(f"{parts.scheme}:// is not called, but {_list(reach.schemes)}")
    if reach.ports is not None and port_of(parts) not in reach.ports:
        raise AddressRefused(f"port {port_of(parts)} is not called, but {_list(reach.ports)}")
    with suppress(ValueError):  # a name, or another spelling, which is seen when it is looked up
        _check_address(ipaddress.ip_address(parts.hostname), reach)
    return parts


def port_of(parts: SplitResult) -> int:
    return parts.port or WEB_PORTS[parts.scheme]


def resolve(url: str, reach: Reach, *, seconds: float = LOOK_UP_SECONDS) -> tuple[SplitResult, str]:
    """The parts of `url` and the one address to dial for it, so that no second look-up can change the answer.

    Raises AddressRefused as `check_url` does, and for a name any of whose addresses is out of `reach`; OSError when the
    name does not resolve within `seconds`.
    """
    parts = check_url(url, reach)
    found = _look_up(parts.hostname or "", port_of(parts), seconds=seconds)
    for each in found:
        _check_address(ipaddress.ip_address(each), reach)
    return parts, found[0]


def _check_address(address: IPv4or6, reach: Reach) -> None:
    if not reach.covers(address):
        raise AddressRefused("the URL leads to an address that is not public")


def _list(allowed: Iterable[object]) -> str:
    return ", ".join(sorted(str(each) for each in allowed))


def is_public(address: IPv4or6) -> bool:
    """Whether a stranger's server may be there; an IPv6 address that embeds an IPv4 one is not."""
    if any(address in network for network in _DENIED if network.version == address.version):
        return False
    if address.version == 6 and address not in _IPV6_PUBLIC:
        return False
    return address.is_global and not address.is_multicast


@contextmanager
def open_answer(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    content: str | None = None,
    reach: Reach,
    connect_seconds: float,
    silent_seconds: float,
    total_seconds: float,
) -> Iterator[httpx2.Response]:
    """The answer to one request, its body not read yet; redirects are not followed, proxies not used.

    All of it is over after `total_seconds`, and the connection is cut when nothing came for `silent_seconds`. Raises
    AddressRefused as `resolve` does, and what is UNREACHABLE.
    """
    ends_at = time.monotonic() + total_seconds
    parts, address = resolve(url, reach, seconds=min(LOOK_UP_SECONDS, total_seconds))
    dialled = httpx2.URL(url).copy_with(host=address)
    told = {**headers, "host": parts.netloc, "user-agent": "Maskline"}
    left = max(0.001, ends_at - time.monotonic())
    timeout = httpx2.Timeout(min(silent_seconds, left), connect=min(connect_seconds, left))
    with _Deadline(left) as deadline, httpx2.Client(trust_env=False, verify=_tls(), timeout=timeout) as client:
        extensions = {"sni_hostname": parts.hostname or "", "trace": deadline.watch}  # TLS verifies the name
        with client.stream(
            method, dialled, content=content, headers=told, extensions=extensions, follow_redirects=False
        ) as answer:
            yield answer


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all calls: to read the certificates of all authorities takes longer than a call."""
    return httpx2.create_ssl_context(trust_env=False)


def _look_up(host: str, port: int, *, seconds: float) -> list[str]:
    """The system's look-up has no bound of its own, so a thread waits for it, which nobody waits for."""
    answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put([str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
            answers.put(error)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"the name was not looked up within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


class _Deadline:
    """Shuts the connection down when the time of a call is over.

    The client's own timeouts begin anew with every byte, so that a server that drips could hold the caller for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, event: str, details: dict[str, Any]) -> None:
        """The client's `trace` hook, which is how it shows its connection."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connection = details["return_value"].get_extra_info("socket")
            if time.monotonic() >= self._ends_at:
                self._cut()

    def _cut(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
