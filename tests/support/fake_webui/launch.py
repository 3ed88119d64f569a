"""A small web UI in a real gradio: loads extensions as Automatic1111 and Forge do, and shows their tabs.

    FAKE_WEBUI=FOLDER python launch.py [--engine PYTHON] [--auth NAME:PASSWORD]

It runs in FOLDER, with extensions/, models/Lora and models/Stable-diffusion, and writes its address to address.txt.
--engine: the interpreter that stands for the environment that `install.py` makes where a host's packages won't do.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from pathlib import Path

import gradio as gr

parser = argparse.ArgumentParser()
parser.add_argument("--auth", default="")
parser.add_argument("--engine", default="")
options = parser.parse_args()
ROOT = Path(os.environ["FAKE_WEBUI"])
IS_3 = gr.__version__.startswith("3.")
os.environ["FAKE_WEBUI_KIND"] = "a1111" if IS_3 else "forge"
os.chdir(ROOT)
sys.argv[1:] = []

import networks  # noqa: E402
from modules import call_queue, devices, script_callbacks, sd_models, shared  # noqa: E402


def load_scripts():
    """As `modules/scripts.py`: A1111 has an extension's folder on the path while it loads, Forge keeps all of them."""
    script_callbacks.clear_callbacks()
    folders = sorted((ROOT / "extensions").iterdir())
    if not IS_3:
        for folder in folders:
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
    before = sys.path
    for folder in folders:
        for path in sorted((folder / "scripts").glob("*.py")):
            try:
                sys.path = [str(folder), *sys.path]
                spec = importlib.util.spec_from_file_location(path.name, path)
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            except Exception:
                traceback.print_exc()
            finally:
                sys.path = before


def page_head():
    head = '<script type="text/javascript" src="file=script.js"></script>\n'
    for path in sorted((ROOT / "extensions").glob("*/javascript/*.mjs")):
        file = f"{path.relative_to(ROOT).as_posix()}?{path.stat().st_mtime}"
        head += f'<script type="module" src="file={file}"></script>\n'
    return head if IS_3 else head + '<meta name="referrer" content="no-referrer"/>'


def add_to_pages():
    original = gr.routes.templates.TemplateResponse

    def template_response(*args, **kwargs):
        response = original(*args, **kwargs)
        response.body = response.body.replace(b"</head>", f"{page_head()}</head>".encode())
        response.init_headers()
        return response

    gr.routes.templates.TemplateResponse = template_response


def build():
    with gr.Blocks(analytics_enabled=False, title="Stable Diffusion") as txt2img:
        gr.Textbox(label="Prompt", elem_id="txt2img_prompt", lines=3)
    interfaces = [(txt2img, "txt2img", "txt2img"), *script_callbacks.ui_tabs_callback()]
    with gr.Blocks(analytics_enabled=False, title="Stable Diffusion") as demo, gr.Tabs(elem_id="tabs"):
        for blocks, title, id in interfaces:
            with gr.TabItem(title, id=id, elem_id=f"tab_{id}"):
                blocks.render()
    return demo


def add_own_routes(app):
    """For tests: what happened inside, and a generation that holds the card."""
    held = threading.Event()
    released = threading.Event()

    def generate():
        with call_queue.queue_lock:
            held.set()
            released.wait()

    def hold():
        released.clear()
        held.clear()
        threading.Thread(target=generate, daemon=True).start()
        held.wait(60)
        return {}

    def release():
        released.set()
        return {}

    def facts():
        trainer = sys.modules.get("trainer")
        return {
            "gradio": gr.__version__,
            "calls": sd_models.calls,
            "collected": len(devices.calls),
            "jobs": shared.state.jobs,
            "job": shared.state.job,
            "texts": [text for text in shared.state.texts if text],
            "networks": sorted(networks.available_networks),
            "lora_hash": sd_models.model_data.sd_model.current_lora_hash,
            "in_weights": [
                part.lora_loader.loaded_hash for part in (sd_models.unet, sd_models.clip.patcher) if not IS_3
            ],
            "trainer": getattr(trainer, "__file__", None),
            "late": getattr(sys.modules.get("trainer.late"), "WHOSE", None),
            "path": sys.path,
            "modules": sorted(sys.modules),
            "followed": sys.modules["dreambooth_lora_extension.webui.queue"]._followed is not None,
            "routes": [
                (method, route.path)
                for route in app.routes
                if getattr(route, "path", "").startswith("/dreambooth")
                for method in route.methods
            ],
        }

    for path, method, function in (
        ("/fake/facts", "GET", facts),
        ("/fake/hold", "POST", hold),
        ("/fake/release", "POST", release),
    ):
        app.add_api_route(path, function, methods=[method])


def launch(auth):
    demo = build()
    demo.queue()
    app, url, _ = demo.launch(
        auth=auth,
        server_name="127.0.0.1",
        allowed_paths=[str(ROOT)],
        prevent_thread_lock=True,
        quiet=True,
        show_api=False,
    )
    app.user_middleware = [x for x in app.user_middleware if x.cls.__name__ != "CORSMiddleware"]
    from starlette.middleware.gzip import GZipMiddleware

    app.middleware_stack = None
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    app.build_middleware_stack()
    add_own_routes(app)
    script_callbacks.app_started_callback(demo, app)
    return url.rstrip("/")


load_scripts()
if options.engine:
    environment = importlib.import_module("dreambooth_lora_extension.webui.environment")
    environment.python = lambda: Path(options.engine)
add_to_pages()
urls = [launch(None)]
if options.auth:
    urls.append(launch([tuple(options.auth.split(":"))]))
temporary = ROOT / "address.part"
temporary.write_text("\n".join(urls), encoding="utf-8")
temporary.replace(ROOT / "address.txt")
threading.Event().wait()
