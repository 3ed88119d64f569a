"""What the pack's panels ask the web UI, all below /dreambooth; behind the host's login, if it has one.

Reading is free to whoever may open the web UI. What changes something wants a header that no foreign page can send, and
an origin that is the web UI's own. No name leads out of the folders that it belongs to (`training.runs.index`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response

from ..pages.finite import finite
from ..pages.guard import LARGEST_BODY, is_own_page
from ..pages.runs import RunPages, take_checkpoint
from ..pages.urls import PREFIX
from ..trainer.core.errors import BusyError, SettingsError, TrainerError, worded
from ..trainer.training.gallery import AS_TRAINED
from ..trainer.training.runs.index import RunIndex
from . import cards, host, queue
from .jobs import ENDED
from .wording import wording

Handler = Callable[[Request], Any]


def add(app: FastAPI) -> None:
    """Add the routes to the host's application, and take up what an earlier process of the host began."""
    login = [Depends(check) for check in _login_checks(app)]
    for method, path, handler in (
        ("GET", "/job", _job),
        ("POST", "/job/stop", _stop),
        ("GET", "/runs", _runs),
        ("GET", "/runs/{run}", _details),
        ("GET", "/runs/{run}/curve", _curve),
        ("GET", "/runs/{run}/files/{file:path}", _file),
        ("POST", "/runs/{run}/use", _use),
        ("POST", "/runs/{run}/resume", _resume),
        ("DELETE", "/runs/{run}", _delete),
    ):
        guarded = _guarded(handler, writes=method != "GET")
        app.add_api_route(PREFIX + path, guarded, methods=[method], dependencies=login, include_in_schema=False)
    queue.attach()


def _login_checks(app: FastAPI) -> list[Callable[..., Any]]:
    """What the host asks before it shows its own page; a route that was added later would not ask by itself."""
    return [route.endpoint for route in app.routes if getattr(route, "path", "").rstrip("/") == "/login_check"][:1]


def _guarded(handler: Handler, *, writes: bool) -> Callable[[Request], Any]:
    """Turn the engine's errors into answers, and refuse writes from elsewhere."""

    async def guarded(request: Request) -> Response:
        try:
            if writes:
                refusal = await _refusal(request)
                if refusal is not None:
                    return refusal
            content = await run_in_threadpool(handler, request)
        except TrainerError as error:
            told = {"problem": error.problem_in(wording), "remedy": error.remedy_in(wording)}
            return _answer(told, 409 if isinstance(error, BusyError) else 404)
        except (ValueError, LookupError, RecursionError) as error:  # also of a body that is no JSON
            return _answer({"problem": f"The request is not valid: {error}.", "remedy": ""}, 400)
        return content if isinstance(content, Response) else _answer(content)

    return guarded


def _answer(content: Any, status: int = 200) -> Response:
    """Content as JSON in ASCII: the bytes of a file's name that are no UTF-8 can be sent, too."""
    return Response(json.dumps(finite(content), separators=(",", ":")), status, media_type="application/json")


async def _refusal(request: Request) -> Response | None:
    """The answer to a write that is not the web UI's own page's, or too large; None if it is allowed."""
    if not is_own_page(request.headers, request.headers.get("host", "")):
        return _answer({"problem": "Only the web UI's own page may do this.", "remedy": ""}, 403)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST_BODY or "transfer-encoding" in request.headers:
        return _answer({"problem": "The request is too large.", "remedy": ""}, 413)
    if "content-encoding" in request.headers:  # of any length once it is unpacked
        return _answer({"problem": "Compressed requests are not accepted.", "remedy": ""}, 415)
    request.state.body = await request.body()
    return None


def _run_index() -> RunIndex:
    return RunIndex(host.data_folder() / "runs")


def _run_pages() -> RunPages:
    job = queue.jobs().running()  # looked for once, however many runs are listed
    trained = job.run if job is not None else None
    return RunPages(_run_index(), wording, lambda run: run == trained)


def _job(request: Request) -> dict[str, Any]:
    """What the job at work does, or how the newest one ended, with those points of its curve that the page lacks."""
    after = int(request.query_params.get("after", "-1"))
    job = queue.shown()
    if job is None:
        return {}
    progress = job.progress()
    facts = dict(progress.facts)
    failed = job.record.get("failed")
    if facts["state"] in ENDED and queue.is_at_work(job):  # so that whoever sees the end may begin another one
        facts["state"] = "copying the LoRA" if facts["state"] == "done" else "ending"
        facts["at"] = math.nextafter(facts["at"], 0.0)  # older than the end, which comes
    if failed and facts["state"] in ("waiting", "done"):  # it could not be started, or its result not be delivered
        facts |= {"state": "failed", "problem": failed[0], "remedy": failed[1]}
        facts["at"] = math.nextafter(facts["at"], math.inf)
    for key in ("problem", "remedy"):
        if key in facts:
            facts[key] = worded(facts[key], wording)
    warnings = [worded(text, wording) for text, is_warning in progress.notes if is_warning]
    known = {"measured": progress.measured, "warnings": warnings, "card": job.record.get("card") or ""}
    known |= {"words": job.record.get("words", ""), "weight": job.record.get("weight", AS_TRAINED)}
    run = facts.get("run")
    is_behind = after < facts.get(
        "step", 0
    )  # a page that has seen all has nothing read for it, above all after the end
    points = {"points": _run_index().curve(run, after)} if run and is_behind else {}
    return facts | known | points


def _stop(request: Request) -> dict[str, Any]:
    job = queue.shown()
    if job is not None:
        job.stop()
    return {}


def _runs(request: Request) -> list[dict[str, Any]]:
    return _run_pages().summaries()


def _details(request: Request) -> dict[str, Any]:
    name = request.path_params["run"]
    details = _run_pages().details(name)
    return details | {"folder": str(_run_index().run(name).path), "resumable": queue.job_of(name) is not None}


def _curve(request: Request) -> dict[str, Any]:
    return _run_index().curve(request.path_params["run"], int(request.query_params.get("after", "-1")))


def _file(request: Request) -> Response:
    path = _run_index().file(request.path_params["run"], request.path_params["file"])
    return FileResponse(path, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})


def _use(request: Request) -> dict[str, Any]:
    """Copy the adapter of a step into the host's LoRA folder, under the first free name, with its card."""
    body = json.loads(request.state.body)
    step = body.get("step") if isinstance(body, dict) else None
    if type(step) is not int:  # True is one, too
        raise ValueError("'step' must be a whole number")
    run = _run_index().run(request.path_params["run"])
    path = take_checkpoint(run, step, host.loras_folder())
    cards.write_card(path, run)
    host.forget_loras()
    return {"file": path.name}


def _resume(request: Request) -> dict[str, Any]:
    run = request.path_params["run"]
    job = queue.job_of(run)
    if job is None:
        raise SettingsError(
            f"The settings of '{run}' were not found.", "Start training with the same settings; the run will resume."
        )
    queue.submit(job)
    return {}


def _delete(request: Request) -> dict[str, Any]:
    _run_index().delete(request.path_params["run"])
    return {}
