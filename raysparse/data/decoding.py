"""From the bytes of a picture to uint8 pixels, the same for every data set; what cannot be read is named as damaged.

- PNG, JPEG, WebP and BMP, recognised by their content and not by the file's name; of an animation the first picture.
- The EXIF orientation is applied: the pixels come out as a viewer shows them. An unreadable EXIF block is ignored.
- Palettes are looked up; transparency is laid on white; gray becomes three equal channels; CMYK goes by Pillow's plain
  formula; of 16 bits the upper 8 are kept. Colour profiles are ignored, as in the papers' code.
"""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Raw = Path | bytes | NDArray[np.uint8]  # a file, its bytes, or pixels [H, W, 3] that need no decoding

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
PIXEL_LIMIT = 100_000_000  # more is taken for a decompression bomb: 300 MB of RGB
_NOT_THERE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}  # a link into the void or to itself
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)


class Damaged(Exception):
    """A picture that cannot be read, with the reason; it is counted and named, and the others are used."""


def decode(raw: Raw) -> Image.Image:
    """The picture in RGB. Damaged where it cannot be read; OSError where the disk fails."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    with _opened(raw) as image:
        image.load()  # before the EXIF block: looking for a PNG's loads it too, and a second load tells of no damage
        turn, rgb = _orientation(image), _rgb(image)
        return rgb.transpose(_TURNS[turn]) if turn in _TURNS else rgb


def size(raw: Raw) -> tuple[int, int]:
    """(width, height) in pixels as `decode` gives them, from the header alone. Errors as there."""
    if isinstance(raw, np.ndarray):
        return raw.shape[1], raw.shape[0]
    with _opened(raw) as image:
        return (image.height, image.width) if _orientation(image) in _TRANSPOSED else (image.width, image.height)


@contextmanager
def _opened(raw: Path | bytes) -> Iterator[Image.Image]:
    """A picture whose header is read. What is raised in the block becomes Damaged too."""
    try:
        stream = io.BytesIO(raw) if isinstance(raw, bytes) else raw.open("rb")
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        raise Damaged(str(error.strerror).lower()) from error
    with stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is decided above, and of bombs, which are refused below
        try:
            with Image.open(stream, formats=FORMATS) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise Damaged(f"{image.width}x{image.height} pixels are more than the limit of {PIXEL_LIMIT}")
                yield image
        except (Damaged, MemoryError):
            raise
        except Exception as error:  # hostile bytes make decoders raise almost anything
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the picture: Pillow's own have no number
            raise Damaged(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP or BMP picture"
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not make the pixels bad
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips at 255
        upper = np.clip(np.asarray(image, np.int64), 0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def centre_square(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of the largest centred square, rounded as in Latent Diffusion's LSUN recipe."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [3, H, W]."""
    array: NDArray[Any] = np.asarray(image, np.uint8).transpose(2, 0, 1)
    return np.ascontiguousarray(array)


def png(array: NDArray[np.uint8]) -> bytes:
    """uint8 [3, H, W] without loss."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))).save(stream, "PNG", compress_level=4)
    return stream.getvalue()
