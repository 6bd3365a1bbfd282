"""Image files, training crops, the noise NCSR adds to them, and the input of low-light models."""

from ncsr_fast.data.crops import RandomCrops, crop_loader
from ncsr_fast.data.degradation import load_degradation
from ncsr_fast.data.images import ImageError, crop_to_multiple, list_images, read_image, to_float, to_uint8, write_image
from ncsr_fast.data.low_light import (
    crop_margins,
    equalize,
    low_light_input,
    match_brightness,
    pad_mirrored,
    pad_to_even,
)
from ncsr_fast.data.perturb import degrade, perturb, to_pair
from ncsr_fast.data.pickled import PickleRefused

__all__ = [
    "ImageError",
    "PickleRefused",
    "RandomCrops",
    "crop_loader",
    "crop_margins",
    "crop_to_multiple",
    "degrade",
    "equalize",
    "list_images",
    "load_degradation",
    "low_light_input",
    "match_brightness",
    "pad_mirrored",
    "pad_to_even",
    "perturb",
    "read_image",
    "to_float",
    "to_pair",
    "to_uint8",
    "write_image",
]
