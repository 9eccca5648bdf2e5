"""What an image that somebody else made is, from its header: refused, or used as it is but for a crop.

The rule, which reader and index share: an image is used upright as stored, in RGB, without its alpha, the
middle of it, with sides cut down to multiples of 16. What that would falsify is refused.
"""

import io
import warnings

from PIL import Image

from data_pipeline.picture import MULTIPLE
from storyanchors.clip import IMAGE_FORMATS, IMAGE_MODES, MAX_FRAME_PIXELS

_ORIENTATION = 0x0112  # EXIF tag; 1 = as stored


def story_frame_size_of(content: bytes) -> tuple[int, int]:
    """(height, width) of the part that is used; ValueError, in words for rejected.jsonl, for what is refused.

    Only the header is decoded, but for an image with alpha, which is taken if nothing of it is transparent.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            exif = Image.Exif()
            exif.load(image.info.get("exif"))
    except Exception as error:  # of a header that was made to trip a parser, anything may come
        raise ValueError(f"not a JPEG, PNG or WebP image ({len(content)} bytes)") from error
    if image.width * image.height > MAX_FRAME_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_FRAME_PIXELS} are decoded")
    if image.format != "JPEG" and getattr(image, "is_animated", False):
        raise ValueError("an animation, expected one picture")
    if exif.get(_ORIENTATION, 1) != 1:
        raise ValueError(f"EXIF orientation {exif[_ORIENTATION]}: turn it upright first")
    if image.mode not in IMAGE_MODES:
        raise ValueError(f"pixels of kind {image.mode}, expected 8 bits of RGB or grey")
    if image.has_transparency_data and _is_transparent(image):
        raise ValueError("transparent: what is behind it is not known")
    height, width = (side // MULTIPLE * MULTIPLE for side in (image.height, image.width))
    if not height or not width:
        raise ValueError(f"{image.width} x {image.height} pixels, expected at least {MULTIPLE} x {MULTIPLE}")
    return height, width


def _is_transparent(image: Image.Image) -> bool:
    try:
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    except Exception as error:
        raise ValueError(f"a damaged image: {error}") from error
