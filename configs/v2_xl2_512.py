"""MDTv2-XL/2 on ImageNet 512×512: configs/v2_xl2.py on latents of 64×64, which are 1,024 tokens.

--config.model.patch_size=4 makes them 256 tokens, as many as at 256×256. Nobody has published such
a network, and no run of this recipe has been measured; what differs from v2_xl2.py is ours.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "v2_xl2.py")
    config.data.image_size = 512
    return configs.variant(config, variant)
