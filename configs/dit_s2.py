"""DiT-S/2 on ImageNet 256×256: the baseline, trained as MDT-S/2 is.

DiT is Peebles & Xie 2023 (arXiv 2212.09748). Its size, diffusion steps, data, batch size and
mirrored images are those of configs/s2.py, too. The learning rate (DiT's is 1e-4), the VAE and the
sampling options are MDT's, so that the two can be compared.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "s2.py")
    config.model.update(decoder_layers=0, side_interpolater=False)  # DiT: one stack of blocks
    config.model.update(relative_bias=False, learned_position=False)  # DiT
    config.mask.passes = "full"  # DiT: no masking
    return configs.variant(config, variant)
