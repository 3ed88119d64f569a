"""An open page of ComfyUI, as its server sees it: what is sent to it, over a bare websocket."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from comfy_host import PATIENCE_S, ComfyServer


@dataclass(frozen=True)
class Message:
    kind: str
    content: Any


class Page:
    """An open page of ComfyUI: keeps what the server sends it."""

    def __init__(self, server: ComfyServer, client_id: str) -> None:
        place = urlsplit(server.url)
        self.messages: list[Message] = []
        self._socket = socket.create_connection((place.hostname, place.port))
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {place.netloc}\r\nUpgrade: websocket\r\n"
        head += f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        self._socket.sendall(head.encode())
        self._stream = self._socket.makefile("rb")
        assert b" 101 " in self._stream.readline()
        while self._stream.readline().strip():
            pass
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _listen(self) -> None:
        """Frames of a server are not masked; none of ComfyUI's is a part of a message."""
        while len(start := self._stream.read(2)) == 2:
            size = start[1]
            if size > 125:
                size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
            content = self._stream.read(size)
            if start[0] == 0x81:
                message = json.loads(content)
                self.messages.append(Message(message["type"], message["data"]))
            elif start[0] == 0x82:
                self.messages.append(Message(f"binary {struct.unpack('>I', content[:4])[0]}", content[4:]))

    def wait_for(self, kind: str, **facts: Any) -> Message:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for message in list(self.messages):
                if message.kind == kind and message.content.items() >= facts.items():
                    return message
            time.sleep(0.02)
        raise TimeoutError(f"no {kind} with {facts}")

    def wait_for_progress(self, node: str) -> None:
        """Wait until a node says that it has done some of its work."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            states = [message.content["nodes"] for message in list(self.messages) if message.kind == "progress_state"]
            if any(nodes.get(node, {}).get("value", 0) > 0 for nodes in states):
                return
            time.sleep(0.02)
        raise TimeoutError(f"{node} does nothing")

    def of_node(self, name: str) -> list[Message]:
        """What is sent because of that node."""
        mine = {"progress_state": lambda data: data["nodes"].get(name, {}).get("state") == "running"}
        mine |= {"dreambooth": lambda data: data["node"] == name}
        mine |= {"binary 3": lambda data: data[4:].startswith(name.encode())}
        return [message for message in self.messages if message.kind in mine and mine[message.kind](message.content)]

    def told(self, name: str) -> list[dict[str, Any]]:
        """The pack's own messages about that node."""
        return [message.content for message in self.of_node(name) if message.kind == "dreambooth"]
