"""Requests as they stand, for tests of a server: nothing is quoted, put in order or followed."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from comfy_host import PATIENCE_S


@dataclass(frozen=True)
class Reply:
    status: int
    content: bytes
    headers: http.client.HTTPMessage

    @property
    def json(self) -> Any:
        def refuse(word: str) -> None:
            raise ValueError(f"{word} is no JSON")

        return json.loads(self.content, parse_constant=refuse)


def ask(url: str, target: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
    """Send a request to the server at `url`; a header with the value "" is left out."""
    place = urlsplit(url)
    lines = {"Host": place.netloc, "Connection": "close", "Content-Length": str(len(body))} | headers
    fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE_S) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\n{fields}\r\n".encode("latin-1") + body)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        return Reply(response.status, response.read(), response.headers)
