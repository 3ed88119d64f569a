"""The second host: a tab in Automatic1111 and Forge.

`host` alone talks to the host's inside. A training is a process of the engine (`jobs`), which survives the page and the
host; `queue` keeps the host's own generation waiting meanwhile, and `cards` brings what was trained into the Extra
Networks browser. `tab` are the widgets, generated from `settings.json`; `routes` is what the panels of `web/lib` ask.
Nothing here needs pydantic or a library that the host may lack.
"""

from __future__ import annotations


def register() -> None:
    """Hang the tab and its routes into the host; called when the host loads its scripts, also again on Reload UI."""
    from . import host, routes, tab

    host.on_tab(tab.build)
    host.on_app(routes.add)
