"""The bridge to ComfyUI, continued: what the pack's pages ask the server, all below /dreambooth.

Reading is free to whoever may open ComfyUI. What changes something wants a header that no foreign page can send, and an
origin that is ComfyUI's own. No name leads out of the folders that it belongs to (`training.runs.index`,
`host.input_path`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..pages.finite import finite
from ..pages.guard import LARGEST_BODY, is_own_page
from ..pages.urls import PREFIX
from ..trainer.core.errors import TrainerError
from . import host, live
from .wording import wording_of

if TYPE_CHECKING:
    from ..pages.runs import RunPages
    from ..trainer.training.runs.index import RunIndex

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def register() -> None:
    """Add the routes to ComfyUI's server, once."""
    from server import PromptServer

    routes = PromptServer.instance.routes
    for method, path, handler in (
        ("GET", "/nodes", _nodes),
        ("GET", "/runs", _runs),
        ("GET", "/runs/{run}", _details),
        ("GET", "/runs/{run}/curve", _curve),
        ("GET", "/runs/{run}/files/{file:.+}", _file),
        ("POST", "/runs/{run}/use", _use),
        ("DELETE", "/runs/{run}", _delete),
        ("GET", "/folders", _folders),
        ("GET", "/folders/pictures", _pictures),
        ("GET", "/folders/thumbnail", _thumbnail),
    ):
        routes.route(method, PREFIX + path)(_guarded(handler, writes=method != "GET"))


def _guarded(handler: Handler, *, writes: bool) -> Handler:
    """Turn the engine's errors into answers, and refuse writes from elsewhere."""
    wording = wording_of(None)

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            if writes:
                _require_own_page(request)
            return await handler(request)
        except TrainerError as error:
            content = {"problem": error.problem_in(wording), "remedy": error.remedy_in(wording)}
            return web.json_response(content, status=404)
        except (ValueError, LookupError, RecursionError) as error:  # also of a body that is no JSON, or in no charset
            return web.json_response({"problem": f"The request is not valid: {error}.", "remedy": ""}, status=400)

    return guarded


def _require_own_page(request: web.Request) -> None:
    if not is_own_page(request.headers, request.host):
        raise web.HTTPForbidden(text="Only ComfyUI's own page may do this.")
    length = request.content_length
    if request.can_read_body and (length is None or length > LARGEST_BODY):  # None: in chunks, of any length
        raise web.HTTPRequestEntityTooLarge(LARGEST_BODY, length or 0)
    if "Content-Encoding" in request.headers:  # of any length once it is unpacked
        raise web.HTTPUnsupportedMediaType


def _run_index() -> RunIndex:
    from ..trainer.training.runs.index import RunIndex

    return RunIndex(host.runs_folder())


def _run_pages() -> RunPages:
    from ..pages.runs import RunPages

    return RunPages(_run_index(), wording_of(None), live.is_training)


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run what reads files in a thread, so that the server's loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(None, partial(function, *arguments))


def _answer(content: Any) -> web.Response:
    return web.json_response(finite(content))


async def _nodes(request: web.Request) -> web.Response:
    return _answer(live.snapshot())


async def _runs(request: web.Request) -> web.Response:
    return _answer(await _in_thread(_run_pages().summaries))


async def _details(request: web.Request) -> web.Response:
    return _answer(await _in_thread(_run_details, request.match_info["run"]))


def _run_details(name: str) -> dict[str, Any]:
    """All of a run but its curve, and its "folder" as ComfyUI's users know it."""
    return _run_pages().details(name) | {"folder": host.shown_folder(_run_index().run(name).path)}


async def _curve(request: web.Request) -> web.Response:
    after = int(request.query.get("after", "-1"))
    return _answer(await _in_thread(_run_index().curve, request.match_info["run"], after))


async def _file(request: web.Request) -> web.StreamResponse:
    path: Path = await _in_thread(_run_index().file, request.match_info["run"], request.match_info["file"])
    return web.FileResponse(path, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})


async def _use(request: web.Request) -> web.Response:
    """Copy the adapter of a step into ComfyUI's LoRA folder, under the first free name, with what galleries show."""
    body = await request.json()
    step = body.get("step") if isinstance(body, dict) else None
    if type(step) is not int:  # True is one, too
        raise ValueError("'step' must be a whole number")
    path = await _in_thread(_take_checkpoint, request.match_info["run"], step)
    return _answer({"file": path.name})


def _take_checkpoint(name: str, step: int) -> Path:
    from ..pages.runs import take_checkpoint
    from ..trainer.training.gallery import is_wanted, write_gallery

    run = _run_index().run(name)
    path = take_checkpoint(run, step, host.loras_folder())
    if is_wanted(run):
        write_gallery(path, run)
    return path


async def _delete(request: web.Request) -> web.Response:
    run = request.match_info["run"]
    live.require_idle(run)
    await _in_thread(_run_index().delete, run)
    return _answer({})


async def _folders(request: web.Request) -> web.Response:
    from . import host_pictures

    return _answer(await _in_thread(host_pictures.picture_folders))


async def _pictures(request: web.Request) -> web.Response:
    from . import host_pictures

    return _answer(await _in_thread(host_pictures.picture_report, request.query["folder"]))


async def _thumbnail(request: web.Request) -> web.Response:
    from . import host_pictures

    content = await _in_thread(host_pictures.thumbnail, request.query["folder"], request.query["picture"])
    return web.Response(body=content, content_type="image/jpeg", headers={"Cache-Control": "no-cache"})
