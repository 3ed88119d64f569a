"""A stand-in for the web UI."""

from web_ui import web_ui  # noqa: F401
