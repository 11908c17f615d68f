"""Your own colour pictures, 64 high and 96 wide: configs/pictures64.py for pictures of 3:2.

Both sides must be multiples of model.patch_size. Every value is ours; no run has been measured.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "pictures64.py")
    config.data.image_width = 96
    return configs.variant(config, variant)
