"""DiT-B/2 on ImageNet 256×256: the baseline, trained as MDT-B/2 is.

It has no masked pass, no side-interpolater, no relative bias and a fixed sine-cosine position, as
in Peebles & Xie 2023 (arXiv 2212.09748), who train it at a rate of 1e-4. MDT's lines have their
sources in configs/b2.py.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(hidden_size=768, depth=12, num_heads=12, patch_size=2)  # as DiT
    config.model.update(decoder_layers=0, side_interpolater=False)  # DiT: one stack of blocks
    config.model.update(relative_bias=False, learned_position=False)  # DiT
    config.model.num_classes = 1000  # ImageNet
    config.mask.passes = "full"  # DiT: no masking
    config.diffusion.steps = 1000  # DiT; MDT's script
    config.data.update(name="tfds", path="imagenet2012")  # DiT; MDT's script
    config.data.update(image_size=256, channels=3)  # DiT; MDT's script
    config.data.update(batch_size=256, flip=True)  # DiT; MDT's script and code
    config.vae.path = "hf://stabilityai/sd-vae-ft-mse"  # MDT's code
    config.optim.update(name="adamw", lr=3e-4, clip_norm=0.0, ema_decay=0.9999)  # MDT's code
    config.train.update(steps=400_000)  # ours: where DiT's S and B are compared
    config.sample.update(num_steps=250, guidance_scale=3.8, guidance_power=4.0)  # MDT's, to compare
    return configs.variant(config, variant)
