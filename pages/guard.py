"""Who may change something: a page of the host's own."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

HEADER = "X-DreamBooth"
LARGEST_BODY = 65_536  # bytes


def is_own_page(headers: Mapping[str, str], host: str) -> bool:
    """Whether a request comes from a page of the host: by a header that foreign pages can't send, and by its origin.

    Args:
        headers: The request's, whose names are compared without regard to case.
        host: The host that it was sent to, with its port.
    """
    origin = headers.get("Origin")
    foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    return headers.get(HEADER) == "1" and not foreign and headers.get("Sec-Fetch-Site") != "cross-site"
