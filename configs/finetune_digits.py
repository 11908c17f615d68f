"""From digits 0–4 to digits 5–9: a run that starts from another one's weights. First that one:

python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits_0_4
    --config.data.name=digits_0_4 --config.model.num_classes=5

Every value is ours, chosen for this small set.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.default()
    config.init.checkpoint = "runs/digits_0_4"
    config.model.update(hidden_size=64, depth=6, num_heads=4, num_classes=5)
    config.data.update(name="digits_5_9", batch_size=64)
    config.optim.update(lr=2e-3, ema_decay=0.99)
    config.train.update(steps=600, log_every=10, sample_every=200, checkpoint_every=100)
    config.sample.update(num_steps=100, guidance_scale=2.0, num_samples=1000)
    return configs.variant(config, variant)
