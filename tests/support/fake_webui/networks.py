"""The built-in extension that keeps LoRA files."""

import functools
import os

from modules.shared_cmd_options import cmd_opts

available_networks = {}
networks_in_memory = {}
reads = []


@functools.lru_cache(maxsize=5)
def load_lora_state_dict(filename):
    reads.append(filename)
    with open(filename, "rb") as file:
        return file.read()


def list_available_networks():
    available_networks.clear()
    for folder, _, names in sorted(os.walk(cmd_opts.lora_dir)):
        for name in names:
            if name.endswith(".safetensors"):
                available_networks[os.path.splitext(name)[0]] = os.path.join(folder, name)


list_available_networks()
