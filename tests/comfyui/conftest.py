"""What the tests of the nodes share."""

from bare_nodes import host  # noqa: F401
