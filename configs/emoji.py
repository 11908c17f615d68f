"""Google's emoji, 32×32 in colour, in pixel space: docs/your-pictures.md.

benchmarks/emoji.py makes their folders. --config.model.num_classes=0 trains without the categories.
An MDTv2 of 64 tokens. Every value is ours.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(version="v2", hidden_size=96, depth=6, num_heads=4, patch_size=4)
    config.model.num_classes = -1
    config.mask.ratio_max = 0.5
    config.diffusion.loss_weight = "min_snr_5"
    config.data.update(name="folder", path="emoji/train", image_size=32, channels=3, batch_size=32)
    config.optim.update(name="adan", lr=1e-2, schedule="cosine", warmup_steps=200)
    config.optim.update(clip_norm=1.0, ema_decay=0.998)
    config.train.update(steps=8000, log_every=50, sample_every=1000, checkpoint_every=500)
    config.sample.update(num_steps=100, guidance_scale=2.0, num_samples=1000)
    config.evaluation.reference = "emoji/test"
    return configs.variant(config, variant)
