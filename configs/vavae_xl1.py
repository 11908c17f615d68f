"""MDTv2-XL/1 on the latents of VA-VAE (Yao et al. 2025, arXiv 2501.01423), trained for velocity.

An image of 256×256 is 16×16 latents of 32 channels, and each is a token. --config.vae.path is the
published file; docs/data.md says how to measure vae.shift and vae.std. Times, their distribution
and the patch are LightningDiT's; the rest is configs/v2_xl2.py's. No run has been measured.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "v2_xl2.py")
    config.model.patch_size = 1
    config.vae.update(path="vavae-imagenet256-f16d32-dinov2.pt")
    config.vae.update(factor=16, channels=32, scale=1.0)
    config.diffusion.update(objective="flow", timesteps="logit_normal", loss_weight="uniform")
    config.sample.update(sampler="heun", num_steps=50, guidance_channels=0)
    return configs.variant(config, variant)
