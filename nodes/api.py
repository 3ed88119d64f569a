"""ComfyUI's programming interface for nodes, in the version that this pack is written for.

The version is named here and nowhere else. ComfyUI keeps numbered versions as they are, while `comfy_api.latest` may
change with every release.
"""

from comfy_api.v0_0_2 import ComfyAPISync, ComfyExtension, io, ui

__all__ = ["ComfyAPISync", "ComfyExtension", "io", "ui"]
