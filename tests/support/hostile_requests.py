"""Requests of strangers to the pack's routes: what is known to lead astray, and a strategy that goes on from there.

`hostile_requests` starts from what pages send and breaks it: names, paths, queries, methods, headers, bodies.
"""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from hypothesis import strategies as st
from sites import OWN, SECRET, Site

# Names of runs below /dreambooth/runs; {run} is the quoted name of a run that is there. Each is another way out.
RUNS = [
    "..", "%2e%2e", ".", "%2e", "%", "%zz", "..%2f..%2fsecret", "%2e%2e%2f%2e%2e%2fsecret", "..%5c..%5csecret",
    "..%252f..%252fsecret", "%2fetc", "%2f", "%5c", "%c0%ae%c0%ae%c0%af..%c0%afsecret", "%e0%80%ae%e0%80%ae",
    "..%u2215secret", "..%e2%88%95secret", "%ef%bc%8e%ef%bc%8e", "%ef%bc%8e%ef%bc%8e%ef%bc%8fsecret", "%00",
    "{run}%00", "{run}%0a", "{run}%20", "{run}.", "{run}%2f", "{run}%2f.", "{run}%2f..%2f{run}", "{run};x", "C:%5c",
    "{run}::$DATA", "CON", "nul.json", "%2fdev%2fzero", "linked", "*", "~", "%ed%a0%80", "%ff",
]  # fmt: skip
RUNS += ["", "a" * 300, "a" * 7000, "a" * 100_000, "%61" * 2000, "%c3%bc" * 1000]
FILES = [
    "..", "..%2frun.json", "%2e%2e/%2e%2e/%2e%2e/secret/run.json", "../../../../secret/run.json", "/etc/passwd",
    "%2fetc%2fpasswd", "../{run}/run.json", "./run.json", "run.json/", "run.json%00", "run.json%0a", "run.json%20",
    "RUN.JSON", "run.json::$DATA", "subject%5c00.jpg", "subject%252f00.jpg", "subject/%c0%ae%c0%ae/run.json",
    "subject", "subject/00.jpg/..", "subject//00.jpg", "cache.safetensors", "subject/%ef%bc%90%ef%bc%90.jpg",
    "step-00000003/state.json", "step-00000003%2foptimizer.safetensors", "%ff",
]  # fmt: skip
FILES += ["", "a" * 300, "a" * 7000, "a" * 100_000]
FOLDERS = [
    "?folder", "?folder=", "?folder=.", "?folder=..", "?folder=%2e%2e%2fsecret%2fpictures",
    "?folder=../secret/pictures", "?folder=dog%20%c3%bc/..", "?folder=dog%20%c3%bc%00", "?folder=%00", "?folder=/etc",
    "?folder=/", "?folder=/dev/zero", "?folder=linked", "?folder=linked/.", "?folder=nowhere", "?folder=..%5csecret",
    "?folder=%c0%ae%c0%ae%c0%afsecret", "?folder=%ed%a0%80", "?folder=%ff", "?folder=..%e2%88%95secret", "?folder=~",
    "?folder=C:%5c",
]  # fmt: skip
FOLDERS += ["", "?folder=" + "a" * 300, "?folder=" + "a/" * 3000, "?folder=" + "a" * 100_000]
IN_DOG = "?folder=dog%20%c3%bc"
NUMBERS = ["", "x", "1.5", "1e3", "%00", "[]", "9" * 5000, "null"]
TARGETS = [
    *(f"/runs/{name}{rest}" for name in RUNS for rest in ("", "/curve", "/files/run.json") if name or rest),
    *(f"/runs/{{run}}/files/{name}" for name in FILES),
    *(f"/runs/{{run}}/curve?after={value}" for value in NUMBERS),
    *(f"/folders/pictures{query}" for query in FOLDERS),
    *(f"/folders/thumbnail{query}&picture=0.png" for query in FOLDERS if query),
    *(f"/folders/thumbnail{IN_DOG}{rest}" for rest in ("", "&picture", "&picture=", f"&picture={'a' * 5000}")),
    *(f"/folders/thumbnail{IN_DOG}&picture={name}" for name in ("../dog%20%c3%bc/0.png", "damaged.jpg", "0.txt")),
    *("/nothing", "/..", "/../dreambooth/nothing", "/runs/{run}/nothing", "/folders/../folders/pictures"),
]

# Name → body of a request to copy a checkpoint, and further headers.
BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    name: (body, {})
    for name, body in {
        "nothing": b"",
        "half": b'{"step": 3',
        "list": b"[3]",
        "null": b"null",
        "number": b"3",
        "text": b'"step"',
        "no step": b"{}",
        "step null": b'{"step": null}',
        "step list": b'{"step": [3]}',
        "step object": b'{"step": {}}',
        "step text": b'{"step": "3"}',
        "step fraction": b'{"step": 3.5}',
        "step true": b'{"step": true}',
        "step infinite": b'{"step": 1e999}',
        "step NaN": b'{"step": NaN}',
        "step negative": b'{"step": -3}',
        "step not there": b'{"step": 4}',
        "step huge": b'{"step": 1' + b"0" * 400 + b"}",
        "step longer than Python reads": b'{"step": 1' + b"0" * 5000 + b"}",
        "no UTF-8": b"\xff\xfe\x00",
        "deep": b"[" * 60_000,
        "form": b"step=3",
    }.items()
}
BODIES |= {
    "unknown charset": (b'{"step": 3}', {"Content-Type": "application/json; charset=nonsense"}),
    "charset that is no text": (b'{"step": 3}', {"Content-Type": "application/json; charset=base64"}),
    "said to be packed": (b'{"step": 3}', {"Content-Encoding": "gzip"}),
    "packed": (gzip.compress(b'{"step": 3}'), {"Content-Encoding": "gzip"}),
    "packed and cut off": (gzip.compress(b'{"step": 3}')[:-4], {"Content-Encoding": "gzip"}),
    "longer than it looks": (gzip.compress(b'{"step": 3}' + b" " * 2**20), {"Content-Encoding": "gzip"}),
    "long": (b'{"step": 3, "more": "' + b"x" * 100_000 + b'"}', {}),
    "said to be very long": (b"", {"Content-Length": str(10**12)}),
    "long, in chunks": (
        b'B\r\n{"step": 3}\r\n186A0\r\n' + b" " * 100_000 + b"\r\n0\r\n\r\n",
        {"Transfer-Encoding": "chunked", "Content-Length": ""},
    ),
    "no length": (b"", {"Content-Length": "x"}),
}
# Name → headers of a page that is not ComfyUI's own.
FOREIGN: dict[str, dict[str, str]] = {
    "no header": {"Content-Type": "application/json"},
    "another value": OWN | {"X-DreamBooth": "0"},
    "form": {"Content-Type": "application/x-www-form-urlencoded"},
    "file form": {"Content-Type": "multipart/form-data; boundary=x"},
    "plain text": {"Content-Type": "text/plain"},
    "foreign origin": OWN | {"Origin": "https://example.com"},
    "foreign origin, no header": {"Origin": "https://example.com"},
    "origin of a file": OWN | {"Origin": "null"},
    "origin on another port": OWN | {"Origin": "http://127.0.0.1:1"},
    "cross-site": OWN | {"Sec-Fetch-Site": "cross-site"},
}

_METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get", "BREW"]
_SEPARATORS = ["/", "%2f", "%2F", "%5c", "\\", "//", "/./", "/../", "%252f", ""]
_FIELDS: dict[str, list[str]] = {
    "Accept-Encoding": ["gzip", "br", "identity;q=0", "*"],
    "Range": ["bytes=0-", "bytes=-5", "bytes=5-2", "bytes=0-0,2-3", f"bytes={'9' * 20}-", "lines=1-2", "bytes=x"],
    "If-Range": ["Mon, 01 Jan 0001 00:00:00 GMT", "x", '"x"'],
    "If-Modified-Since": ["Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 99 Foo 2020 99:99:99 GMT", "0"],
    "If-Unmodified-Since": ["Thu, 01 Jan 1970 00:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 GMT"],
    "If-None-Match": ["*", '"x"', "x", 'W/"'],
    "If-Match": ["*", '"x"', ""],
    "Content-Type": ["application/json; charset=utf-16", "application/json; charset=\x80", "x", "/"],
    "Content-Encoding": ["gzip", "deflate", "br", "zstd", "x"],
    "Transfer-Encoding": ["chunked", "gzip, chunked", "x"],
    "Content-Length": ["-1", "1e3", "9" * 20, "+5"],
    "Origin": ["null", "http://", "http://[", "http://[::1", "https://example.com", "\x80", "http://127.0.0.1:99999999"],
    "Host": ["example.com", "[", "a:b:c", "127.0.0.1:99999999", "\x80"],
    "Expect": ["100-continue", "x"],
    "Connection": ["Upgrade", "keep-alive, x"],
    "Upgrade": ["websocket"],
    "Cookie": ["=", "a=\x00" * 3, "x" * 5000],
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # as it stands in the request; Latin-1
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Such a character would end the request, or its target."""
        assert not {*self.target} & {*"\r\n "}

    def to_bytes(self) -> bytes:
        """As a line of JSON, with a character for each byte of the body."""
        return json.dumps(vars(self) | {"body": self.body.decode("latin-1")}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Request:
        """The request that `to_bytes` wrote."""
        values = json.loads(content)
        return cls(**values | {"body": values["body"].encode("latin-1")})


def _names(good: Sequence[str], bad: Sequence[str]) -> st.SearchStrategy[str]:
    """Names in a path or a query: good ones, bad ones, any text, quoted or not, any bytes, and all of it joined."""
    any_text = st.text(max_size=20).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe=""))
    any_bytes = st.binary(max_size=20).map(lambda raw: "".join(chr(byte) for byte in raw if byte not in b"\r\n ?#"))
    name = st.sampled_from([quote(name, safe="") for name in good]) | st.sampled_from(list(bad)) | any_text | any_bytes
    joined = st.lists(name, min_size=1, max_size=4).flatmap(
        lambda parts: st.sampled_from(_SEPARATORS).map(lambda between: between.join(parts))
    )
    return name | joined


@st.composite
def _damaged(draw: st.DrawFn, text: str) -> str:
    """A text with a character or two left out, put in or doubled."""
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(text)))
        inserted = draw(
            st.sampled_from(["", "", "/", ".", "%", "%00", "\\", "?", "&", "=", "#", "\x00", "\xff", text[:place]])
        )
        text = text[:place] + inserted + text[place + draw(st.integers(0, 1)) :]
    return text


@st.composite
def hostile_requests(draw: st.DrawFn, site: Site) -> Request:
    """A request to the routes of a site that nobody means well with; some are those of its pages after all."""
    details = site.shelf.details(site.run)
    files = ["run.json", "metrics.jsonl", "workflow.json", "subject/00.jpg", details["preview"]]
    files += [adapter["file"] for adapter in details["adapters"]]
    run = _names([site.run, "linked", "secret"], [name.replace("{run}", quote(site.run)) for name in RUNS])
    file = _names(files, [name.replace("{run}", quote(site.run)) for name in FILES])
    folder = _names(["dog ü", "cat.zip", "linked", "evil.zip", "empty"], [query.partition("=")[2] for query in FOLDERS])
    picture = _names(["0.png", "2.png", "damaged.jpg"], ["../0.png", "0.txt", "%00"])
    number = st.sampled_from(NUMBERS) | st.integers().map(str)
    target = draw(
        st.one_of(
            st.sampled_from(["/nodes", "/runs", "/folders", ""]),
            run.map("/runs/{}".format),
            st.builds("/runs/{}/curve?after={}".format, run, number),
            st.builds("/runs/{}/files/{}".format, run, file),
            run.map("/runs/{}/use".format),
            folder.map("/folders/pictures?folder={}".format),
            st.builds("/folders/thumbnail?folder={}&picture={}".format, folder, picture),
        )
    )
    target = draw(_damaged(draw(st.sampled_from(["", "/api"])) + "/dreambooth" + target))
    body, headers = draw(
        st.sampled_from(sorted(BODIES.values(), key=repr))
        | st.tuples(_json_bodies() | st.binary(max_size=50), st.just({}))
    )
    chosen = draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=3, unique=True))
    headers = headers | {name: draw(st.sampled_from(_FIELDS[name])) for name in chosen}
    own = OWN if draw(st.booleans()) else {}
    target = "".join(character for character in target if character not in "\r\n ")
    return Request(draw(st.sampled_from(_METHODS)), target, body, own | headers)


def _json_bodies() -> st.SearchStrategy[bytes]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    return (values | st.builds(lambda value: {"step": value}, values)).map(lambda value: json.dumps(value).encode())


def assert_harmless(site: Site, request: Request) -> None:
    """Send a request: it is no error of the server's, tells nothing of what lies outside, and changes nothing.

    But for what pages may change: a checkpoint may be copied, with its card, and a run deleted, which is put back.
    """
    before = site.kept()
    try:
        reply = site.ask(request.target, request.method, request.body, **request.headers)
    except (ConnectionError, http.client.HTTPException):  # cut off, since there is nothing to answer to
        reply = None
    if reply is not None and reply.status >= 500 and _host_itself_fails(site, request):
        return
    assert reply is None or reply.status < 500, (request, reply.status, reply.content[:500])
    assert reply is None or SECRET.encode() not in reply.content, (request, reply.content[:500])
    if reply and reply.headers.get("Content-Type") == "image/jpeg" and reply.status == 200:
        assert not site.is_secret(reply.content), request
    after = site.kept()
    changed = {Path(path) for path, _ in before.items() ^ after.items()}
    if not site.folder.exists():
        site.put_back()
    if changed:
        assert reply is not None, request
        assert reply.status == 200, request
        assert request.headers.get("X-DreamBooth") == "1", request
    if changed and request.method == "POST":
        for made in changed:
            made.unlink()
            assert made.parent == site.loras, request
    elif changed:
        assert request.method == "DELETE", request
        assert all(path.is_relative_to(site.folder) for path in changed), (request, changed)


def _host_itself_fails(site: Site, request: Request) -> bool:
    """Whether the host can't answer such a request, wherever it leads: ComfyUI can't read every Origin."""
    reply = site.ask("/no-such-route", request.method, request.body, **request.headers)
    return reply.status >= 500
