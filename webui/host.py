"""The bridge to Automatic1111 and Forge: the only module that knows `modules`."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..trainer.core.errors import SettingsError
from .tokenizers import made_tokenizer, open_clip_merges

TITLE = "DreamBooth LoRA"
_FOLDER = "dreambooth"
_OTHER_NAMES = (None,)  # of no LoRAs, so that a layer takes its own weights back before it gets others
_TOKENIZERS = (
    "backend/huggingface/runwayml/stable-diffusion-v1-5/tokenizer",  # Forge
    "ldm_patched/modules/sd1_tokenizer",  # Classic
)


def on_tab(build: Callable[[], Any]) -> None:
    """Have the host show what `build` gives, a `gradio.Blocks`, as a tab."""
    from modules import script_callbacks

    script_callbacks.on_ui_tabs(lambda: [(build(), TITLE, "dreambooth")])


def on_app(add: Callable[[Any], None]) -> None:
    """Call `add` with the host's FastAPI application once it is there."""
    from modules import script_callbacks

    script_callbacks.on_app_started(lambda _, app: add(app))


def data_folder() -> Path:
    """Where pictures, jobs and runs are kept."""
    from modules import paths

    return Path(paths.data_path) / _FOLDER


def loras_folder() -> Path:
    """Where the host looks for LoRA files."""
    from modules import shared

    return Path(shared.cmd_opts.lora_dir)


def embeddings_folder() -> Path:
    """Where the host looks for embedding files."""
    from modules import shared

    return Path(shared.cmd_opts.embeddings_dir)


def bases() -> list[str]:
    """The titles of the host's checkpoints, the loaded one first."""
    from modules import sd_models, shared

    titles = [str(title) for title in sd_models.checkpoint_tiles()]
    loaded = sd_models.get_closet_checkpoint_match(getattr(shared.opts, "sd_model_checkpoint", None))
    first = [str(loaded.title)] if loaded is not None and str(loaded.title) in titles else []
    if loaded is not None and not first:
        first = [title for title in titles if title == str(loaded.name)]
    return first + [title for title in titles if title not in first]


def refresh_bases() -> list[str]:
    """Look for checkpoints again; their titles."""
    from modules import sd_models

    sd_models.list_models()
    return bases()


def base_file(title: str) -> Path:
    """The file of a checkpoint.

    Raises:
        SettingsError: The host has none of that title.
    """
    from modules import sd_models

    match = sd_models.get_closet_checkpoint_match(title) if title else None
    if match is None:
        raise SettingsError(
            f"There is no checkpoint '{title}'." if title else "No base model is chosen.",
            "Choose one from the list; the button next to it refreshes the list.",
        )
    return Path(match.filename)


def tokenizer() -> Path | None:
    """A CLIP tokenizer that comes with the host, or is made of what comes with it; None if there is neither.

    Raises:
        StorageError: It can't be written.
    """
    from modules import paths

    for relative in _TOKENIZERS:
        folder = Path(paths.script_path) / relative
        if folder.is_dir():
            return folder
    merges = open_clip_merges()  # Automatic1111
    return made_tokenizer(merges, data_folder() / "tokenizer") if merges else None


@contextlib.contextmanager
def given_back(show: Callable[[], str], is_wanted: Callable[[], bool]) -> Iterator[None]:
    """Wait until the host generates nothing, free the card, and keep the host waiting for the block.

    Forge loads its model again when it next needs it; Automatic1111 gets it back after the block.

    Args:
        show: One line on what is being done, for whoever waits.
        is_wanted: Whether the card still is, once the host generates nothing; if not, the host keeps its model.
    """
    from modules import call_queue, devices, sd_models, shared

    with call_queue.queue_lock:
        if not is_wanted():
            yield
            return
        model = getattr(sd_models.model_data, "sd_model", None)
        if model is not None:
            sd_models.unload_model_weights()
        devices.torch_gc()
        ended = threading.Event()
        shared.state.begin(job="dreambooth")
        teller = threading.Thread(target=_tell, args=(shared.state, show, ended), daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()
            shared.state.end()
            if model is not None and hasattr(sd_models, "send_model_to_device"):
                sd_models.send_model_to_device(model)


def _tell(state: Any, show: Callable[[], str], ended: threading.Event) -> None:
    while not ended.wait(1.0):
        state.textinfo = show()


def forget_loras() -> None:
    """Have the host look for LoRA files again and read each again: it keeps weights, and prompts encoded with them.

    And for embedding files, which Forge looks for only while it loads a model.
    """
    _forget_prompts()
    _read_embeddings_anew()
    networks = sys.modules.get("networks")
    if networks is None:
        with contextlib.suppress(ImportError):
            networks = importlib.import_module("networks")
    if networks is None:  # the built-in extension is switched off
        return
    cached = getattr(networks, "load_lora_state_dict", None)
    if hasattr(cached, "cache_clear"):
        cached.cache_clear()
    in_memory = getattr(networks, "networks_in_memory", None)
    if isinstance(in_memory, dict):
        in_memory.clear()
    networks.list_available_networks()
    from modules import sd_models

    model = getattr(sd_models.model_data, "sd_model", None)
    if model is not None and hasattr(model, "current_lora_hash"):
        model.current_lora_hash = None
    layers = getattr(model, "modules", None)  # of Automatic1111, where each knows by name what is in its weights
    for layer in layers() if callable(layers) else ():
        if getattr(layer, "network_current_names", ()):
            layer.network_current_names = _OTHER_NAMES
    parts = getattr(model, "forge_objects", None)  # of Forge, where those that are in the weights are known by path
    for part in (getattr(parts, "unet", None), getattr(getattr(parts, "clip", None), "patcher", None)):
        loader = getattr(part, "lora_loader", None)
        if hasattr(loader, "loaded_hash"):
            loader.loaded_hash = None


def _read_embeddings_anew() -> None:
    from modules import sd_models

    model = getattr(sd_models.model_data, "sd_model", None)
    for engine in list(getattr(model, "__dict__", {}).values()):  # of Forge, one for each text encoder
        database = getattr(engine, "embeddings", None)
        if hasattr(database, "embedding_dirs") and hasattr(database, "load_textual_inversion_embeddings"):
            database.load_textual_inversion_embeddings()


def _forget_prompts() -> None:
    """Have the host encode its last prompts again: of a LoRA in them, perhaps a text encoder's, it knows the name."""
    processing = sys.modules.get("modules.processing")
    for kind in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            kept = getattr(getattr(processing, kind, None), name, None)
            if isinstance(kept, list):
                kept[:] = [None] * len(kept)
