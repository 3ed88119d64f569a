"""Picture files without their metadata, for files with damaged metadata but intact pixels."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_DISPLAY = (*_PNG_PIXELS, b"iCCP", b"eXIf")  # and what says how to show them
_JPEG_PIXELS = {0xE0: 14, 0xEE: 12}  # APP0, JFIF; APP14, Adobe's colour transform; with the bytes of a whole one
_JPEG_DISPLAY = (b"Exif\0\0", b"ICC_PROFILE\0")
_MAX_XMP_BYTES = 64 * 1024 * 1024
_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def without_metadata(content: bytes) -> Iterator[bytes]:
    """A picture file with progressively less metadata: without text, then also without colour profile and EXIF.

    Args:
        content: The file's bytes.

    Yields:
        PNG and JPEG files with the same pixels; nothing for others.
    """
    if content.startswith(_PNG):
        yield _png_with(content, _PNG_DISPLAY)
        yield _png_with(content, _PNG_PIXELS)
    elif content.startswith(b"\xff\xd8\xff"):
        yield _jpeg_with(content, _JPEG_DISPLAY)
        yield _jpeg_with(content, ())


def _png_with(content: bytes, kept: tuple[bytes, ...]) -> bytes:
    """A PNG file with these chunks alone, and of XMP with the orientation; optional ones only if they are undamaged."""
    parts = [_PNG]
    orientation = b""
    position = len(_PNG)
    while position + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        data = content[position + 8 : end - 4]
        is_pixels = name in _PNG_PIXELS
        is_whole = content[end - 4 : end] == struct.pack(">I", zlib.crc32(name + data))
        if is_pixels or (name in kept and is_whole):
            if name in (b"IDAT", b"IEND") and orientation:
                parts.append(_png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + orientation))
                orientation = b""
            parts.append(content[position:end])
        elif name == b"iTXt" and len(kept) > len(_PNG_PIXELS):
            orientation = _xmp_orientation(data) or orientation
        position = end
    return b"".join(parts)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _xmp_orientation(data: bytes) -> bytes:
    """What XMP in an iTXt chunk says of a picture's orientation; empty if it says nothing."""
    keyword, _, rest = data.partition(b"\0")
    if keyword != b"XML:com.adobe.xmp" or len(rest) < 2:
        return b""
    text = rest[2:].split(b"\0", 2)[-1]
    if rest[0]:
        try:
            text = zlib.decompressobj().decompress(text, _MAX_XMP_BYTES)
        except zlib.error:
            return b""
    match = _ORIENTATION.search(text)
    return b'tiff:Orientation="' + match[1] + b'"' if match else b""


def _jpeg_with(content: bytes, kept: tuple[bytes, ...]) -> bytes:
    """A JPEG file whose application segments and comments are left out, but for those that begin with `kept`."""
    parts = [content[:2]]
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xDA:  # the pixels
            break
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # padding, or a marker without content
            parts.append(content[position : position + (1 if marker == 0xFF else 2)])
            position += 1 if marker == 0xFF else 2
            continue
        end = position + 2 + struct.unpack_from(">H", content, position + 2)[0]
        data = content[position + 4 : end]
        is_whole = len(data) >= _JPEG_PIXELS.get(marker, len(data) + 1)
        is_metadata = (0xE0 <= marker <= 0xEF and not is_whole) or marker == 0xFE
        if not is_metadata or data.startswith(kept):
            parts.append(content[position:end])
        position = end
    return b"".join([*parts, content[position:]])
