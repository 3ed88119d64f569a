"""What Automatic1111 and Forge load: it hangs the pack's tab into their page. Everything else is in `webui/`.

The pack is imported as one package of an unusual name, and nothing is put on `sys.path`: another extension's `trainer`
is none of ours.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

_NAME = "dreambooth_lora_extension"


def _load() -> None:
    root = Path(__file__).resolve().parents[1]
    for name in [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]:
        del sys.modules[name]  # Reload UI after an update of the pack
    spec = importlib.util.spec_from_file_location(_NAME, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"{_NAME}.webui").register()


_load()
