"""Image files, training crops, and the noise that NCSR adds to crops."""

from ncsr_fast.data.crops import RandomCrops, crop_loader
from ncsr_fast.data.degradation import load_degradation
from ncsr_fast.data.images import ImageError, crop_to_multiple, list_images, read_image, to_float, to_uint8, write_image
from ncsr_fast.data.perturb import degrade, perturb, to_pair
from ncsr_fast.data.pickled import PickleRefused

__all__ = [
    "ImageError",
    "PickleRefused",
    "RandomCrops",
    "crop_loader",
    "crop_to_multiple",
    "degrade",
    "list_images",
    "load_degradation",
    "perturb",
    "read_image",
    "to_float",
    "to_pair",
    "to_uint8",
    "write_image",
]
