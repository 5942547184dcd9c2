"""Where the service may connect to on a customer's word: public addresses alone, checked once and then dialled."""

import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from shared.errors import MasklineError

IPv4or6 = ipaddress.IPv4Address | ipaddress.IPv6Address

# What `is_global` of the standard library lets through although nobody's server is there, or the cloud's own is.
_DENIED = tuple(
    ipaddress.ip_network(each)
    for each in (
        "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "224.0.0.0/4",
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
)  # fmt: skip
_IPV6_PUBLIC = ipaddress.ip_network("2000::/3")
PORTS = frozenset({80, 443})


class AddressRefused(MasklineError):
    code = "address_refused"


def resolve(url: str, *, allow_private: bool) -> tuple[SplitResult, str]:
    """The parts of `url` and the one address to dial for it, so that no second look-up can change the answer.

    Raises AddressRefused for another scheme, and unless private addresses are allowed, for a port that is not the
    web's or a name any of whose addresses is not public; OSError when the name does not resolve.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise AddressRefused("only http and https URLs with a host and no user name are called")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(each[4][0]) for each in found]
    if not allow_private and (port not in PORTS or not all(is_public(each) for each in addresses)):
        raise AddressRefused("the URL leads to an address that is not public")
    return parts, str(addresses[0])


def is_public(address: IPv4or6) -> bool:
    """Whether a stranger's server may be there; an IPv6 address that embeds an IPv4 one is not."""
    if any(address in network for network in _DENIED if network.version == address.version):
        return False
    if address.version == 6 and address not in _IPV6_PUBLIC:
        return False
    return address.is_global and not address.is_multicast
