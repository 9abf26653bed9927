"""Pictures of every kind as pixels, and what cannot be read named as damaged."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raysparse.data import decoding, shards
from raysparse.data.decoding import Damaged
from raysparse.data.image import ImageOptions
from raysparse.errors import UsageError


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corners() -> Image.Image:
    """40 x 20: red, green, blue, yellow quarters, clockwise from the upper left."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, 20:], pixels[10:, :20] = [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0),
    ]  # fmt: skip
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95, "subsampling": 0}, 12)],
)
def test_every_format_gives_the_pixels(kind: str, options: dict[str, Any], tolerance: int, tmp_path: Path) -> None:
    data = encoded(corners(), kind, **options)
    wrongly_named = tmp_path / "picture.PNG"
    wrongly_named.write_bytes(data)
    for raw in (data, wrongly_named):
        pixels = decoding.pixels(decoding.decode(raw))
        assert pixels.shape == (3, 20, 40)
        assert pixels.dtype == np.uint8
        expected = np.asarray(corners()).transpose(2, 0, 1).astype(int)
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance
        assert decoding.size(raw) == (40, 20)


TURNED = {  # EXIF orientation -> colours of the corners as a viewer shows them, clockwise from the upper left
    1: "rgby", 2: "gryb", 3: "byrg", 4: "ybgr", 5: "rybg", 6: "yrgb", 7: "bgry", 8: "gbyr",
}  # fmt: skip
COLOURS = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "y": (255, 255, 0)}


@pytest.mark.parametrize("orientation", TURNED)
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(corners(), "PNG", exif=exif.tobytes())
    image = decoding.decode(data)
    assert image.size == decoding.size(data) == ((40, 20) if orientation < 5 else (20, 40))
    w, h = image.width - 1, image.height - 1
    seen = [image.getpixel(place) for place in ((0, 0), (w, 0), (w, h), (0, h))]
    assert seen == [COLOURS[letter] for letter in TURNED[orientation]]


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    data = encoded(corners(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert decoding.decode(data).size == (40, 20)


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    rgba.putpixel((1, 1), (200, 0, 0, 255))
    rgba.putpixel((2, 2), (0, 0, 0, 128))
    pixels = decoding.pixels(decoding.decode(encoded(rgba, "PNG")))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 1, 1].tolist() == [200, 0, 0]
    assert np.abs(pixels[:, 2, 2].astype(int) - 127).max() <= 1
    gray = encoded(Image.new("LA", (4, 4), (90, 0)), "PNG")
    assert (decoding.pixels(decoding.decode(gray)) == 255).all()


def test_palettes_with_and_without_a_transparent_colour() -> None:
    palette = corners().quantize(4)
    assert np.array_equal(np.asarray(decoding.decode(encoded(palette, "PNG"))), np.asarray(corners()))
    transparent = palette.getpixel((0, 0))
    pixels = decoding.pixels(decoding.decode(encoded(palette, "PNG", transparency=transparent)))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 39].tolist() == [0, 255, 0]


def test_gray_one_bit_and_sixteen_bits() -> None:
    assert decoding.pixels(decoding.decode(encoded(Image.new("L", (2, 2), 77), "PNG"))).tolist() == [[[77] * 2] * 2] * 3
    assert decoding.pixels(decoding.decode(encoded(Image.new("1", (2, 2), 1), "PNG"))).min() == 255
    deep = Image.fromarray(np.array([[0, 255, 256], [4660, 32768, 65535]], np.uint16))
    pixels = decoding.pixels(decoding.decode(encoded(deep, "PNG")))
    assert pixels[0].tolist() == [[0, 0, 1], [18, 128, 255]]
    assert (pixels[0] == pixels[1]).all()


def test_cmyk() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)
    r, g, b = decoding.pixels(decoding.decode(data))[:, 4, 4].tolist()
    assert r < 20
    assert g > 235
    assert b > 235


def test_an_animation_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert decoding.pixels(decoding.decode(data))[:, 0, 0].tolist() == [255, 0, 0]


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a PNG"),
        (b"no picture at all", "not a PNG"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "not a PNG"),
        (encoded(corners(), "PNG")[:60], "."),
        (encoded(corners().resize((400, 200)), "JPEG")[:900], "truncated"),
        (bomb(), "decompression bomb"),
    ],
    ids=["empty", "text", "gif", "cut png", "cut jpeg", "bomb"],
)
def test_what_cannot_be_read_is_damaged(data: bytes, reason: str) -> None:
    with pytest.raises(Damaged, match=reason):
        decoding.decode(data)


def test_a_damaged_png_is_not_half_a_picture() -> None:
    """Its header and its length are those of a whole one; only its compressed pixels are not."""
    data = bytearray(encoded(Image.effect_noise((40, 20), 50), "PNG"))
    data[data.index(b"IDAT") + 4 + 200] ^= 0xFF
    with pytest.raises(Damaged, match="broken data stream"):
        decoding.decode(bytes(data))


def test_too_many_pixels_below_pillows_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIXEL_LIMIT", 799)
    with pytest.raises(Damaged, match=r"40x20 pixels are more than the limit of 799"):
        decoding.decode(encoded(corners(), "PNG"))


def test_a_link_into_the_void_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(Damaged, match="no such file"):
        decoding.decode(tmp_path / "gone.png")


def test_a_link_to_itself_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(Damaged, match="symbolic links"):
        decoding.decode(tmp_path / "loop.png")


def test_a_failing_disk_is_not_a_damaged_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not shrink the data set."""

    class Failing(io.BytesIO):
        def read(self, *arguments: Any) -> bytes:
            if self.tell() > 40:  # beyond the header
                raise OSError(errno.EIO, "Input/output error")
            return super().read(*arguments)

    data = encoded(Image.effect_noise((64, 64), 50), "PNG")
    monkeypatch.setattr(Path, "open", lambda *_: Failing(data))
    with pytest.raises(OSError, match="Input/output error"):
        decoding.decode(tmp_path / "a.png")


@settings(max_examples=200)
@given(st.data())
def test_changed_bytes_are_read_or_damaged_and_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
    good = bytearray(encoded(corners(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decoding.decode(bytes(good))
    except Damaged:
        return
    assert image.mode == "RGB"


def test_centre_crop_then_resize_is_latent_diffusions() -> None:
    """By the lines of its LSUN loader: crop = min(h, w); img[(h - crop) // 2 : (h + crop) // 2, ...]; PIL bicubic."""
    generator = np.random.default_rng(0)
    for height, width in ((91, 130), (130, 91), (64, 64), (33, 32)):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        crop = min(height, width)
        cut = pixels[(height - crop) // 2 : (height + crop) // 2, (width - crop) // 2 : (width + crop) // 2]
        expected = Image.fromarray(cut).resize((32, 32), Image.Resampling.BICUBIC)
        got = shards.square(encoded(Image.fromarray(pixels), "PNG"), ImageOptions(size_px=32, resize="centre"), "a")
        assert np.array_equal(got, np.asarray(expected).transpose(2, 0, 1))


def test_the_celeba_crop() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    cut = pixels[121 - 64 : 121 + 64, 89 - 64 : 89 + 64]
    options = ImageOptions(size_px=128, resize="celeba")
    got = shards.square(encoded(Image.fromarray(pixels), "PNG"), options, "a")
    assert np.array_equal(got, cut.transpose(2, 0, 1))
    with pytest.raises(UsageError, match=r"odd.png has 40x20 pixels, but resize: celeba takes .* 178x218"):
        shards.square(encoded(corners(), "PNG"), options, "odd.png")


def test_another_size_without_a_resize_rule() -> None:
    with pytest.raises(UsageError, match=r"odd.png has 40x20 pixels, but resize: none takes pictures of 32x32"):
        shards.square(encoded(corners(), "PNG"), ImageOptions(size_px=32), "odd.png")


def test_png_keeps_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    assert np.array_equal(decoding.pixels(decoding.decode(decoding.png(pixels))), pixels)
