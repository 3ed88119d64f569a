"""What extensions want to be called for. An extension that fails is reported, and the host goes on without it."""

import sys
import traceback

callbacks_app_started = []
callbacks_ui_tabs = []


def on_app_started(callback):
    callbacks_app_started.append(callback)


def on_ui_tabs(callback):
    callbacks_ui_tabs.append(callback)


def app_started_callback(demo, app):
    for callback in callbacks_app_started:
        try:
            callback(demo, app)
        except Exception:
            traceback.print_exc(file=sys.stderr)


def ui_tabs_callback():
    tabs = []
    for callback in callbacks_ui_tabs:
        try:
            tabs += callback() or []
        except Exception:
            traceback.print_exc(file=sys.stderr)
    return tabs


def clear_callbacks():
    callbacks_app_started.clear()
    callbacks_ui_tabs.clear()
