"""The command line; whoever imports the host fills it first."""

import os
from types import SimpleNamespace

_data_dir = os.environ["FAKE_WEBUI"]
cmd_opts = SimpleNamespace(
    data_dir=_data_dir,
    lora_dir=os.path.join(_data_dir, "models", "Lora"),
    embeddings_dir=os.path.join(_data_dir, "embeddings"),
)
IS_FORGE = os.environ.get("FAKE_WEBUI_KIND") == "forge"
