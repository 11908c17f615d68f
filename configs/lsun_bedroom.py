"""MDT-XL/2 on LSUN bedroom 256×256, without classes.

The published project trained on ImageNet alone: the network and its training are those of
configs/xl2.py; the data and what follows from it are ours.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "xl2.py")
    config.model.num_classes = 0  # ours: one kind of picture
    # Prepare the set with: tfds build lsun/bedroom --file_format=array_record
    config.data.path = "lsun/bedroom"  # ours: 3,033,042 images
    config.train.steps = 500_000  # ours
    config.sample.guidance_scale = 1.0  # ours: without classes there is no guidance
    return configs.variant(config, variant)
