"""Checkpoints by title, name and hash; and the model that is loaded."""

import hashlib
import os
import re
from types import SimpleNamespace

from modules.shared_cmd_options import IS_FORGE, cmd_opts

model_path = os.path.join(cmd_opts.data_dir, "models", "Stable-diffusion")
checkpoints_list = {}
checkpoint_aliases = {}
unet = SimpleNamespace(lora_loader=SimpleNamespace(loaded_hash="of the last picture"))
clip = SimpleNamespace(patcher=SimpleNamespace(lora_loader=SimpleNamespace(loaded_hash="of the last picture")))
model_data = SimpleNamespace(sd_model=SimpleNamespace(current_lora_hash="of the last picture"))
if IS_FORGE:
    model_data.sd_model.forge_objects = SimpleNamespace(unet=unet, clip=clip)
calls = []


class CheckpointInfo:
    def __init__(self, filename):
        self.filename = filename
        self.name = os.path.relpath(filename, model_path)
        self.model_name = os.path.splitext(os.path.basename(filename))[0]
        self.shorthash = hashlib.sha256(self.name.encode()).hexdigest()[:10]
        self.title = f"{self.name} [{self.shorthash}]"
        self.short_title = f"{self.model_name} [{self.shorthash}]"
        self.ids = [self.shorthash, self.model_name, self.title, self.name, self.short_title]

    def register(self):
        checkpoints_list[self.title] = self
        for id in self.ids:
            checkpoint_aliases[id] = self


def checkpoint_tiles(use_short=False):
    if IS_FORGE:
        return [x.short_title if use_short else x.name for x in checkpoints_list.values()]
    return [x.short_title if use_short else x.title for x in checkpoints_list.values()]


def list_models():
    checkpoints_list.clear()
    checkpoint_aliases.clear()
    for folder, _, names in sorted(os.walk(model_path)):
        for name in sorted(names):
            if name.endswith((".ckpt", ".safetensors")):
                CheckpointInfo(os.path.join(folder, name)).register()


def get_closet_checkpoint_match(search_string):
    if not search_string:
        return None
    checkpoint_info = checkpoint_aliases.get(search_string)
    if checkpoint_info is not None:
        return checkpoint_info
    for text in (search_string, re.sub(r"\s*\[[^]]+]\s*$", "", search_string)):
        found = sorted([info for info in checkpoints_list.values() if text in info.title], key=lambda x: len(x.title))
        if found:
            return found[0]
    return None


def unload_model_weights(sd_model=None, info=None):
    calls.append("unload")


def send_model_to_device(m):
    calls.append("load")


list_models()
