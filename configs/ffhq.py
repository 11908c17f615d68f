"""MDT-XL/2 on FFHQ 256×256, without classes.

The published project trained on ImageNet alone: the network and its training are those of
configs/xl2.py; the data and what follows from it are ours.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "xl2.py")
    config.model.num_classes = 0  # ours: faces are not labelled
    # --config.data.path is the path of the published folder images1024x1024.
    config.data.update(name="folder", path="")  # ours: 70,000 images
    config.train.steps = 400_000  # ours
    config.sample.guidance_scale = 1.0  # ours: without classes there is no guidance
    return configs.variant(config, variant)
