"""From digits 0–4 to digits 5–9: a run that starts from another run's weights. Train that first:

python -m mdt_jax.main --config=configs/digits.py --workdir=runs/digits_0_4
    --config.data.name=digits_0_4 --config.model.num_classes=5

Every value is ours, chosen for this small set.
"""

from mdt_jax import config as configs


def get_config(variant=""):
    config = configs.base(__file__, "digits.py")
    config.init.checkpoint = "runs/digits_0_4"
    config.model.num_classes = 5
    config.data.name = "digits_5_9"
    config.optim.ema_decay = 0.99
    config.train.update(steps=600, sample_every=200, checkpoint_every=100)
    return configs.variant(config, variant)
