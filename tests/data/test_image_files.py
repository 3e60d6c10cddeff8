"""One image file: its pixels, or one reason why it cannot be read."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.image_files import (
    FORMATS,
    MAX_PIXELS,
    SUFFIXES,
    BrokenImageError,
    Stamp,
    open_image,
    read_header,
    read_image,
    read_mask,
    to_channels,
)

SIDE = 16
RAMP = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
ALPHA = RAMP.T[:, ::-1]


def write(path, image, **options):
    image.save(path, **options)
    return path


def header(path):
    stat = path.stat()
    return read_header(path, Stamp(stat.st_size, stat.st_mtime_ns))


def on_white(colour, alpha):
    part = alpha[..., None] / 255.0
    return np.rint(colour * part + 255.0 * (1.0 - part))


def palette_image():
    image = Image.fromarray(RAMP, "P")
    image.putpalette(COLOURS.reshape(-1).tolist())
    return image


CASES = {
    "grey.png": (Image.fromarray(RAMP), RAMP[..., None]),
    "colour.png": (Image.fromarray(COLOURS), COLOURS),
    "colour.bmp": (Image.fromarray(COLOURS), COLOURS),
    "colour.tiff": (Image.fromarray(COLOURS), COLOURS),
    "bits.png": (
        Image.fromarray(RAMP > 100),
        np.where(RAMP > 100, 255, 0)[..., None],
    ),
    "wide.png": (
        Image.fromarray(RAMP.astype(np.uint16) * 251),
        np.rint(RAMP * 251.0 / 257.0)[..., None],
    ),
    "wide.tif": (
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        RAMP[..., None],
    ),
    "palette.png": (palette_image(), COLOURS),
    "see_through.png": (
        Image.fromarray(np.dstack([COLOURS, ALPHA])),
        on_white(COLOURS, ALPHA),
    ),
    "see_through_grey.png": (
        Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]),
        on_white(RAMP[..., None], ALPHA),
    ),
    "ink.tif": (
        Image.merge(
            "CMYK",
            [Image.fromarray(x) for x in (*np.moveaxis(COLOURS, -1, 0), 0 * RAMP)],
        ),
        255 - COLOURS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_image_mode_is_read_as_a_viewer_shows_it(tmp_path, name):
    image, wanted = CASES[name]
    path = write(tmp_path / name, image)
    found = read_image(path)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted)
    assert header(path).is_grey == (wanted.shape[-1] == 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.webp", {"lossless": True, "exact": True}),
        ("a.webp", {"quality": 95}),
        ("a.jpg", {"quality": 95}),
        ("a.jpeg", {"quality": 95, "progressive": True}),
        ("a.jfif", {"quality": 95}),
        ("a.avif", {"quality": 95}),
        ("named_wrongly.png", {"format": "JPEG", "quality": 95}),
    ],
)
def test_jpeg_and_webp_files_are_read_whatever_their_suffix(tmp_path, name, options):
    assert name.endswith(SUFFIXES)
    image = Image.new("RGB", (SIDE, 2 * SIDE), (200, 100, 50))
    path = write(tmp_path / name, image, **options)
    found = read_image(path).astype(int)
    assert found.shape == (2 * SIDE, SIDE, 3)
    assert np.abs(found - [200, 100, 50]).max() <= 4
    assert header(path)[:2] == (2 * SIDE, SIDE)


def test_cmyk_jpeg_is_read_as_rgb(tmp_path):
    image = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    found = read_image(write(tmp_path / "cyan.jpg", image, quality=95)).astype(int)
    assert np.abs(found - [0, 255, 255]).max() <= 4


def test_transparent_palette_entries_and_colours_become_white(tmp_path):
    clear = RAMP == 3
    for name, image, transparency in (
        ("palette.png", palette_image(), 3),
        ("bytes.png", palette_image(), bytes([255, 255, 255, 0])),
        ("colour.png", Image.fromarray(COLOURS), tuple(map(int, COLOURS[0, 3]))),
    ):
        path = write(tmp_path / name, image, transparency=transparency)
        assert np.array_equal(read_image(path)[~clear], COLOURS[~clear])
        assert (read_image(path)[clear] == 255).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animation_is_read_as_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = tmp_path / name
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (read_image(path) == [255, 0, 0]).all()


BY_ORIENTATION = {  # the stored rows as a viewer shows them
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", BY_ORIENTATION)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg", "a.avif"])
def test_images_are_oriented_by_their_exif_tag(tmp_path, name, orientation):
    stored = np.zeros((2 * SIDE, SIDE, 3), np.uint8)
    stored[:SIDE, : SIDE // 2], stored[SIDE:, SIDE // 2 :] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100}}.get(name, {})
    options |= {"subsampling": 0} if name == "a.jpg" else {}
    options |= {"quality": 100, "subsampling": "4:4:4"} if name == "a.avif" else {}
    path = write(tmp_path / name, Image.fromarray(stored), exif=exif, **options)
    wanted = BY_ORIENTATION[orientation](stored).astype(int)
    assert np.abs(read_image(path) - wanted).max() <= (
        3 if name in ("a.jpg", "a.avif") else 0
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_changes_no_orientation(tmp_path):
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40)
    path = write(tmp_path / "a.jpg", Image.fromarray(COLOURS), exif=exif, quality=100)
    assert read_image(path).shape == (SIDE, SIDE, 3)


def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width, height, data=b""):
    """Make a grey PNG file that states a size and holds the given compressed rows."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (12_000, 10_000, f"12000x10000 pixels, wanted at most {MAX_PIXELS:,} in all"),
        (60_000, 60_000, f"more than {MAX_PIXELS:,} pixels"),  # Pillow's own limit
        (16_385, 1_000, "16385x1000 pixels, wanted at most 16,384 a side"),
        (10, 201, "10x201 pixels, wanted at most 20 to 1"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_absurd_sizes_are_refused_from_the_header_alone(
    tmp_path, width, height, reason
):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, zlib.compress(bytes(1000))))
    for read in (header, read_image):
        with pytest.raises(BrokenImageError) as caught:
            read(path)
        assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"GIF89", "not an image, or its head is damaged"),
        (b"<html>not found</html>", "not an image, or its head is damaged"),
    ],
)
def test_file_that_is_not_an_image_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=reason):
        header(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_file_is_refused_by_read_header(tmp_path, kind):
    random = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(random).save(buffer, kind)
    content, path = buffer.getvalue(), tmp_path / "a.png"
    for part in (0.02, 0.1, 0.5, 0.9):
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(BrokenImageError):
            header(path)
    path.write_bytes(content)
    assert header(path)[:2] == (64, 64)


def test_trailing_bytes_do_not_change_the_pixels(tmp_path):
    path = write(tmp_path / "a.jpg", Image.fromarray(COLOURS))
    before = read_image(path)
    path.write_bytes(path.read_bytes() + bytes(10))
    assert header(path).format == "JPEG"
    assert np.array_equal(read_image(path), before)


def test_corrupt_pixel_data_is_refused_by_read_image_only(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(SIDE, SIDE, b"not what deflate makes"))
    assert header(path) == (SIDE, SIDE, "L", "PNG")
    with pytest.raises(BrokenImageError):
        read_image(path)


def test_grey_values_beyond_sixteen_bits_are_refused(tmp_path):
    deep = Image.fromarray(np.full((SIDE, SIDE), 70_000, np.int32))
    floats = Image.fromarray(np.ones((SIDE, SIDE), np.float32))
    with pytest.raises(BrokenImageError, match="beyond 0 to 65535"):
        read_image(write(tmp_path / "deep.tif", deep))
    with pytest.raises(BrokenImageError, match="floats"):
        read_image(write(tmp_path / "floats.tif", floats))


def test_missing_file_is_not_a_broken_image(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.png"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to("/dev/zero")
    for read in (read_image, read_mask):
        with pytest.raises(BrokenImageError, match="not a regular file"):
            read(path)


def test_other_formats_of_pillow_are_not_opened(tmp_path):
    path = tmp_path / "a.png"
    for kind in ("EPS", "PPM", "TGA", "PCX", "ICO", "JPEG2000", "SGI"):
        Image.fromarray(COLOURS).save(path, format=kind)
        with pytest.raises(BrokenImageError, match="not an image"), open_image(path):
            raise AssertionError(kind)


SPOT = np.where(RAMP > 100, 255, 0).astype(np.uint8)


def clear_around():
    """White paint on nothing."""
    return Image.merge("LA", [Image.new("L", SPOT.shape, 255), Image.fromarray(SPOT)])


MASKS = {
    "grey.png": Image.fromarray(SPOT),
    "bits.png": Image.fromarray(SPOT > 0),
    "rgb.png": Image.fromarray(SPOT).convert("RGB"),
    "opaque.png": Image.fromarray(SPOT).convert("RGBA"),
    "clear.png": clear_around().convert("RGBA"),
    "clear_grey.png": clear_around(),
    "palette.png": Image.fromarray(SPOT).convert("P"),
    "few.gif": Image.fromarray(SPOT).quantize(2),
    "wide.png": Image.fromarray(SPOT.astype(np.uint16) * 257),
    "rgb.bmp": Image.fromarray(SPOT).convert("RGB"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_has_the_levels_that_a_paint_program_shows(tmp_path, name):
    levels = read_mask(write(tmp_path / name, MASKS[name]))
    assert np.array_equal(levels, SPOT[..., None])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_mask_of_0_and_1_keeps_its_levels(tmp_path, dtype):
    image = Image.fromarray((SPOT > 0).astype(dtype))
    path = write(tmp_path / "a.tif", image)
    assert np.array_equal(read_mask(path), SPOT[..., None] // 255)


def test_channels_are_converted_as_for_training():
    grey = RAMP[..., None]
    assert np.array_equal(to_channels(grey, 3), grey.repeat(3, axis=-1))
    assert np.array_equal(to_channels(grey.repeat(3, axis=-1), 1), grey)
    wanted = np.asarray(Image.fromarray(COLOURS).convert("L"))[..., None]
    assert np.array_equal(to_channels(COLOURS, 1), wanted)
