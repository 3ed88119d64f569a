"""The card."""

calls = []


def torch_gc():
    calls.append("torch_gc")
