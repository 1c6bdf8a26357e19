"""Whether a request comes from who sends it: a proxy lends its own address, this machine's for one, to others. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from starlette.types import Scope

from weighbridge.registry.errors import Forbidden, Invalid

_HEADERS: Final = frozenset({b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"x-proxycontextpath"})
_PREFIX: Final = b"x-forwarded-"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Forwarding:
    """`trusted`: addresses and networks of proxies. What they say of a caller is read by nobody. Raises Invalid."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = tuple(map(_network, trusted))

    def check(self, scope: Scope) -> None:
        """Raise Forbidden for what anybody else forwarded, and says so: browsers cannot be made to say it."""
        named = next((key for key, _ in scope["headers"] if key in _HEADERS or key.startswith(_PREFIX)), None)
        if named is None:
            return
        peer = scope["client"][0] if scope.get("client") else ""
        if not any(_is_within(peer, network) for network in self._trusted):
            raise Forbidden(
                f"this was forwarded ({named.decode('latin-1')[:60]}) by {peer or 'somebody on this machine'}, whom "
                "this registry does not trust with it: name the proxy in registry.trusted_proxies, or call without one"
            )


def _is_within(peer: str, network: Network) -> bool:
    try:
        found = ipaddress.ip_address(peer)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found) in network


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise Invalid(f"registry.trusted_proxies: {text!r} is no address or network: {error}") from error
