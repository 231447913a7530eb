"""Decoding of one image file: colors, orientation, damage, and the files that all decoders decode
alike.

``decode`` defines the pixels of every file that it accepts. Other decoders are faster, and are used
for files for which ``decodes_alike`` is true.
"""

import functools
import itertools
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastokd.errors import ConfigError, escape

if TYPE_CHECKING:
    from PIL import Image

_NAMES = (
    "apng avif bmp dds dib gif ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo pbm pcx pgm png"
    " pnm ppm qoi ras sgi tga tif tiff webp"
)
EXTENSIONS = frozenset(f".{name}" for name in _NAMES.split())
"""Extensions, in lower case, of the formats that ``decode`` reads."""

_FORMATS = "JPEG PNG GIF BMP DIB WEBP TIFF PPM AVIF JPEG2000 ICO PCX DDS QOI SGI SUN TGA"
"""Pillow's names of the formats that are decoded, whatever the extension."""

Color = tuple[int, int, int]
"""Red, green and blue from 0 to 255."""

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
MOST_ELONGATED = 64
"""Images that are longer by more than this factor are narrowed before they are scaled."""

_ORIENTATION = 0x0112
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_WITH_ALPHA = (4, 6)
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # fmt: skip # noqa: E501
_COLOR_DEPENDENT = frozenset({b"acTL", b"eXIf", b"iTXt", b"tRNS", b"zTXt"})
"""PNG chunks about orientation, transparency and animation, which decoders treat differently."""


def parse_color(text: str) -> Color:
    """The color that a name such as ``white`` or a number such as ``#ff8000`` stands for.

    Raises:
        ConfigError: it is not a color, or a transparent one.
    """
    from PIL import ImageColor

    try:
        red, green, blue, alpha = (*ImageColor.getrgb(text), 255)[:4]
        if alpha < 255:
            raise ValueError
    except ValueError:
        fix = "pass a name such as white, or #rrggbb"
        raise ConfigError(f"background={escape(text)}: not an opaque color; {fix}") from None
    return red, green, blue


@functools.cache
def _installed_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS.split() if name in Image.OPEN)


def open_image(content: bytes) -> "Image.Image":
    """An image file, opened by Pillow. Only documented formats are tried: Pillow passes PostScript,
    for example, to Ghostscript.
    """
    from PIL import Image

    return Image.open(BytesIO(content), formats=_installed_formats())


def decode(source: str | Path | BytesIO, background: Color | None = None) -> "Image.Image":
    """Decode an image file or its bytes, of any format, into an upright 8-bit RGB image.

    Grayscale, palette and CMYK images are converted; grayscale of 9 to 16 bits keeps its 8 high
    bits, as Pillow does for 16-bit color; the orientation in EXIF or XMP is applied; the first
    frame of an animation is used.

    Args:
        source: the file, or its bytes.
        background: the color behind transparent pixels; None drops the transparency, so that they
            have whatever color the file gives them.

    Raises:
        Exception: any exception of Pillow, for a file that is missing, truncated, not an image, or
            extremely large; ``ValueError`` for damage that Pillow tolerates.
    """
    from PIL import Image

    content = source.getvalue() if isinstance(source, BytesIO) else Path(source).read_bytes()
    with open_image(content) as file:
        file.load()
        _check_complete(content, file)
        image: Image.Image = file
        turn = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }.get(_orientation(file))
        if turn is not None:
            image = image.transpose(turn)
        return to_rgb(image, background, file.format, getattr(file, "tag_v2", None))


def to_rgb(
    image: "Image.Image",
    background: Color | None = None,
    format: str | None = None,
    tags: Mapping[int, Any] | None = None,
) -> "Image.Image":
    """Convert an image of any mode to 8-bit RGB, see ``decode``; ``format`` and the TIFF ``tags``
    are those of its file.
    """
    if background is not None and image.has_transparency_data:
        return _composed(image, background)
    # Pillow clips 16-bit grayscale at 255 when it converts to RGB, and knows no range for 32-bit
    # integers and floats.
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        image = _high_byte(image, tags or {})
    elif image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}-mode pixels (32 bits) have no defined 8-bit range")
    elif image.mode == "LAB":
        raise ValueError("LAB colors have no defined conversion to RGB; convert the file")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _composed(image: "Image.Image", background: Color) -> "Image.Image":
    """An image with transparency on a background."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, of which one level is transparent
        levels, level = np.asarray(image), image.info["transparency"]
        opaque = Image.fromarray(np.where(levels == level, 0, 255).astype(np.uint8))
        image = _high_byte(image, {}).convert("RGB")
        image.putalpha(opaque)
    elif image.mode == "La":
        image = image.convert("LA")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _orientation(file: "Image.Image") -> int:
    """The orientation, 1 to 8, in EXIF or XMP; 1 where it cannot be read."""
    try:
        orientation = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # metadata is often damaged, and says nothing about the pixels
        return 1
    return orientation if isinstance(orientation, int) else 1


def _high_byte(image: "Image.Image", tags: Mapping[int, Any]) -> "Image.Image":
    """The 8 high bits of grayscale with 9 to 16 bits; ``tags`` are those of a TIFF file."""
    from PIL import Image

    bits, photometric = tags.get(258, (16,))[0], tags.get(262, 1)
    levels = np.asarray(image).astype(np.int64) >> (bits - 8)
    if photometric == 0:  # white is zero, which Pillow inverts only for 8 bits
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8))


class _Header(NamedTuple):
    """The fields of a PNG file's IHDR chunk."""

    width: int
    height: int
    bits: int
    color: int
    compression: int
    filtering: int
    interlaced: int

    @property
    def num_bytes(self) -> int:
        """The number of decompressed bytes of all rows."""
        passes = _ADAM7 if self.interlaced else ((0, 0, 1, 1),)
        total = 0
        for left, top, across, down in passes:
            columns = max(0, -(-(self.width - left) // across))
            rows = max(0, -(-(self.height - top) // down))
            bits = columns * self.bits * _CHANNELS.get(self.color, 1)
            total += rows * (1 + -(-bits // 8)) if columns else 0
        return total


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The names and contents of a PNG file's chunks, up to IEND.

    Raises:
        ValueError: a wrong checksum, or no IEND.
    """
    position = len(PNG)
    while position + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        checksum = content[position + 8 + length : position + 12 + length]
        if len(checksum) == 4 and zlib.crc32(data, zlib.crc32(name)) != int.from_bytes(checksum):
            shown = name.decode("ascii", "replace")
            raise ValueError(f"damaged: the checksum of its PNG chunk {shown} is wrong")
        yield name, data
        if name == b"IEND":
            return
        position += 12 + length
    raise ValueError("truncated: the PNG file has no end marker")


def _check_complete(content: bytes, image: "Image.Image") -> None:
    """Raise ``ValueError`` for damage that Pillow tolerates in a file that it decoded."""
    if content.startswith(PNG):
        chunks = list(_png_chunks(content))
        header = _Header(*struct.unpack(">IIBBBBB", chunks[0][1]))
        # Missing rows are left at zero.
        if (
            header.interlaced
            or not np.asarray(image.crop((0, image.height - 1, *image.size))).any()
        ):
            stream = zlib.decompressobj()
            pixels = b"".join(data for name, data in chunks if name == b"IDAT")
            if len(stream.decompress(pixels, header.num_bytes)) < header.num_bytes:
                raise ValueError("truncated: rows of the PNG file are missing")
    elif content.startswith(JPEG):
        if _lacks_restarts(content):
            raise ValueError("truncated: rows of the JPEG file are missing")
        check_jpeg_rows(content, np.asarray(image.crop((0, image.height - 1, *image.size))))


def check_jpeg_rows(content: bytes, last_row: "np.typing.NDArray[np.uint8]") -> None:
    """Raise ``ValueError`` if rows are missing before the end marker of a JPEG file, for which
    libjpeg returns mid-gray: then further data before the marker changes the last row.
    """
    end = content.rfind(b"\xff\xd9")
    if end < 0 or not (last_row == 128).all():
        return
    longer = content[:end] + bytes(range(1, 200)) * 8 + content[end:]
    try:
        with open_image(longer) as image:
            changed = np.asarray(image.crop((0, image.height - 1, *image.size)))
    except Exception:  # the further data is damage that is noticed
        return
    if not (changed == 128).all():
        raise ValueError("truncated: rows of the JPEG file are missing")


def _lacks_restarts(content: bytes) -> bool:
    """True for a sequential JPEG file of one scan with fewer restart markers than its size needs;
    for missing rows, libjpeg continues with the pixels before them.
    """
    position, interval, num_blocks, num_components = 2, 0, 0, 0
    while position + 4 <= len(content):
        mark, kind, length = struct.unpack_from(">BBH", content, position)
        body = content[position + 4 : position + 2 + length]
        if mark != 0xFF:
            return False
        if kind == 0xFF:  # a fill byte
            position += 1
            continue
        if kind == 0xDD and len(body) == 2:
            interval = int.from_bytes(body)
        elif kind in (0xC0, 0xC1) and len(body) >= 9:
            height, width, num_components = struct.unpack_from(">HHB", body, 1)
            across, down = 8, 8
            if num_components > 1:
                factors = body[7::3]
                across *= max(each >> 4 for each in factors)
                down *= max(each & 15 for each in factors)
            num_blocks = -(-width // across) * -(-height // down)
        elif kind == 0xDA:
            break
        position += 2 + length
    else:
        return False
    # Another number: several scans.
    if not interval or not num_blocks or not body or body[0] != num_components:
        return False
    end = content.find(b"\xff\xd9", position)
    restarts = re.findall(rb"\xff[\xd0-\xd7]", content[position : None if end < 0 else end])
    return len(restarts) < -(-num_blocks // interval) - 1


HEADER_BYTES = 1 << 14
"""Enough of most JPEG files for ``is_plain_jpeg``."""


def is_plain_jpeg(head: bytes) -> bool:
    """``decodes_alike`` for the start of a file: True only for JPEG files with a simple header."""
    try:
        size = _simple_jpeg(head) if head.startswith(JPEG) else None
    except (struct.error, IndexError):  # the header is longer
        return False
    return size is not None and not is_elongated(*size)


def decodes_alike(content: bytes, background: Color | None = None) -> bool:
    """True if every decoder gives an image file the pixels of ``decode``, up to rounding: 8-bit
    JPEG, PNG and WebP files without properties that decoders treat differently.
    """
    try:
        if content.startswith(PNG):
            return _plain_png(content, background is None)
        if is_plain_jpeg(content):
            return True

        with open_image(content) as image:
            info, mode = image.info, image.mode
            if is_elongated(*image.size) or b"Orientation" in bytes(info.get("xmp", b"")):
                return False
            if image.format == "WEBP":
                animated = getattr(image, "is_animated", False)
                return mode == "RGB" and not animated and "exif" not in info
            valid = image.getexif().get(_ORIENTATION, 1) in range(1, 9)
            jpeg = image.format in ("JPEG", "MPO") and mode in ("L", "RGB")
            return jpeg and valid and info.get("adobe_transform", 1) == 1
    except Exception:  # reported when it is decoded
        return False


def _plain_png(content: bytes, takes_alpha: bool) -> bool:
    chunks = list(_png_chunks(content))
    header = _Header(*struct.unpack(">IIBBBBB", chunks[0][1]))
    text = any(name == b"tEXt" and data.startswith(b"Raw profile") for name, data in chunks)
    transparent = header.color in _WITH_ALPHA and not takes_alpha
    plain = (
        header.bits == 8
        and not transparent
        and _COLOR_DEPENDENT.isdisjoint(name for name, _ in chunks)
    )
    return plain and not text and not is_elongated(header.width, header.height)


def _simple_jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG file of 8 bits in gray or YCbCr, without the segments of EXIF,
    XMP and Adobe; None for others. It is fast, because it runs for every image of a first epoch.
    """
    position = 2
    for _ in itertools.repeat(None, 64):
        mark, kind, length = struct.unpack_from(">BBH", content, position)
        if mark != 0xFF or kind in (0xE1, 0xEE):
            return None
        if kind in (0xC0, 0xC1, 0xC2):
            bits, height, width, count = struct.unpack_from(">BHHB", content, position + 4)
            first = content[position + 10]
            return (
                (width, height)
                if bits == 8 and (count == 1 or (count == 3 and first == 1))
                else None
            )
        if 0xC3 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return None
        position += 2 + length
    return None


def is_elongated(width: int, height: int) -> bool:
    """True for an image that is narrowed before it is scaled."""
    return max(width, height) > MOST_ELONGATED * min(width, height)


def central_part(width: int, height: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of the part of an elongated image that a central square
    and its filter need; all of another image. Scaling the whole image would need memory in
    proportion to its length.
    """
    if not is_elongated(width, height):
        return 0, 0, width, height
    most = MOST_ELONGATED * min(width, height)
    across, down = (max(0, (side - most) // 2) for side in (width, height))
    return across, down, width - across, height - down
