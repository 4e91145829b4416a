"""Whether somebody can be reached, asked once: libraries try again for half a minute."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request

_SECONDS = 5.0


def is_reachable(endpoint: str) -> bool:
    """Returns whether somebody answers at an address; behind a proxy, where nobody can know, yes.

    Args:
        endpoint: a URL, such as "https://huggingface.co".
    """
    parts = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies() or parts.hostname is None:
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True
