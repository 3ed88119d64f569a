"""Pictures as pages show them: small JPEGs."""

from __future__ import annotations

import io

from ..trainer.data.images import Picture

_THUMBNAIL_SIDE = 192  # pixels


def as_thumbnail(picture: Picture) -> bytes:
    """A picture as a small JPEG."""
    image = picture.open()
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
