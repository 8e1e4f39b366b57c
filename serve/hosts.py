"""Which names a request may call the server by.

A page of any site may have its own name point at this machine, and then reads, in the browser of whoever opens it, what this
server says: to the browser both are one site. Such a request carries the site's name as its Host, so names that are not
known are refused. Addresses can not be pointed anywhere.
"""

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

ANY = "*"

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
    """Knows this machine's own names, the address that is listened at, and what else is allowed.

    Args:
        allowed: names and addresses, without a port; ``*``: every one.
        listening: what the server was told to listen at. Where that is every address, every address is allowed: which
            ones lead here from outside is not known.
    """

    def __init__(self, allowed: Sequence[str], listening: str) -> None:
        given = [one.lower() for one in (*allowed, listening)]
        self._names = {"localhost", *given}
        self._addresses = {address_of(one) for one in given} - {None}
        self._is_any = ANY in allowed
        listened = address_of(listening)
        self._is_any_address = listened is not None and listened.is_unspecified

    def allow(self, scope: Scope) -> bool:
        """Whether a request may be answered; one without a Host (HTTP/1.0, no browser) may."""
        came = Headers(scope=scope).getlist("host")
        return self._is_any or all(self._knows(one, scope) for one in came)

    def _knows(self, host: str, scope: Scope) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().removesuffix(".")
        address = address_of(name)
        if address is None:
            return name in self._names
        asked = address_of((scope.get("server") or ("",))[0])  # the address that the client connected to
        return address.is_loopback or self._is_any_address or address == asked or address in self._addresses


def address_of(text: str) -> _Address | None:
    """The IP address that ``text`` is, with or without brackets; None for a name. ``::ffff:1.2.3.4`` is 1.2.3.4."""
    try:
        found = ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found
