"""Which images of others are used, and which part of them."""

import io

import pytest
from PIL import Image

from data_pipeline.image_facts import story_frame_size_of
from storyanchors.clip import decode_image


def encoded(image: Image.Image, form: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sides_are_cut_to_multiples_of_16_and_the_reader_agrees(form, mode):
    content = encoded(Image.new(mode, (95, 64)), form)
    height, width = story_frame_size_of(content)
    assert (height, width) == (64, 80)
    assert decode_image(content, (width, height)).size == (80, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_where_nothing_is_transparent(mode):
    image = Image.new(mode, (32, 32))
    image.putalpha(255)
    assert story_frame_size_of(encoded(image)) == (32, 32)
    alpha = Image.new("L", (32, 32), 255)
    alpha.putpixel((3, 3), 254)
    image.putalpha(alpha)
    with pytest.raises(ValueError, match="transparent"):
        story_frame_size_of(encoded(image))


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.new("RGB", (32, 32)), "JPEG", exif=exif.tobytes())


def test_an_upright_exif_orientation_is_no_rotation():
    assert story_frame_size_of(rotated(1)) == (32, 32)


REFUSED = {
    "EXIF orientation 6": rotated(6),
    "CMYK": encoded(Image.new("CMYK", (32, 32)), "JPEG"),
    "I;16": encoded(Image.new("I;16", (32, 32))),
    "animation": encoded(
        Image.new("RGB", (32, 32)), "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")]
    ),
    "at least 16": encoded(Image.new("RGB", (15, 400))),
    "at most": encoded(Image.new("1", (8192, 4096))),
    "not a JPEG, PNG or WebP": encoded(Image.new("RGB", (32, 32)), "GIF"),
    "not a JPEG": b"\xff\xd8\xff" + bytes(100),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_falsified_is_refused(reason):
    with pytest.raises(ValueError, match=reason):
        story_frame_size_of(REFUSED[reason])
