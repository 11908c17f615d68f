"""Small classifiers of real images, whose features tell how far samples are from them.

python benchmarks/features.py --data=mnist     trains benchmarks/classifiers/mnist.safetensors anew
python benchmarks/features.py --data=emoji --path=emoji

A convolutional network is trained on the training split alone. Its 64 features before the last
layer are compared as Gaussians, and its classes with those asked for. A Fréchet distance in pixels
hardly sees what makes a picture. Prints the share of held-out images that the network classifies
correctly and the file's SHA-256.
"""

import pathlib

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from mdt_jax import cli
from mdt_jax.data import sources
from mdt_jax.data.sources import Images
from mdt_jax.evaluation.image_sets import open_images
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import atomic_write, file_sha256

FOLDER = pathlib.Path(__file__).with_name("classifiers")
EMOJI_SIZE = 32  # of configs/emoji.py
EPOCHS, BATCH, RATE = 40, 64, 2e-3
SHIFT = 16  # images move by up to a 16th of their width, rounded down


class Network(nn.Module):
    """Images [N, H, W, C] uint8 → (features [N, 64], logits [N, classes]), float32."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, training: bool = False) -> tuple[jax.Array, jax.Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for width in (16, 32, 32):
            x = nn.gelu(nn.Conv(width, (3, 3), strides=2)(x))
        x = nn.gelu(nn.Dense(64)(x.reshape(len(x), -1)))
        return x, nn.Dense(self.classes)(nn.Dropout(0.3, deterministic=not training)(x))


class Classifier:
    """A trained `Network`; features of real images and of samples are compared by it."""

    def __init__(self, data: str):
        """data: the set it was trained on. Raises UserError where there is none in FOLDER."""
        path = FOLDER / f"{data}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} does not exist; benchmarks/features.py --data={data} makes it")
        params = flax.traverse_util.unflatten_dict(load_file(path), sep=".")
        network = Network(params["Dense_1"]["bias"].size)
        self._apply = jax.jit(lambda images: network.apply({"params": params}, images))
        self.sha256 = file_sha256(path)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W, C] uint8 → (features [N, 64] float32, classes [N])."""
        parts = [self._apply(images[i : i + 500]) for i in range(0, len(images), 500)]
        features, logits = (np.concatenate(each) for each in zip(*parts, strict=True))
        return features, logits.argmax(-1)


def load_images(data: str, path: str) -> tuple[Images, Images]:
    """(training images, held-out images). path: of the folder with train/ and test/, for emoji."""
    if data != "emoji":
        return sources.load(data)
    if not path:
        raise UserError("--data=emoji needs --path=FOLDER, which benchmarks/emoji.py makes")
    parts = (open_images(f"{path}/{part}", EMOJI_SIZE, True) for part in ("train", "test"))
    train, held_out = (
        Images(part.take(np.arange(len(part))), np.asarray(part.labels), [*part.classes])
        for part in parts
    )
    if train.classes != held_out.classes:
        raise UserError(f"{path}/train and {path}/test have other classes; make the folder anew")
    return train, held_out


def train_classifier(train: Images, epochs: int = EPOCHS) -> dict:
    """The parameters of a `Network` trained on labelled images."""
    network = Network(len(train.classes))
    steps = epochs * len(train) // BATCH
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=1e-2)
    key = jax.random.key(0)
    params = network.init(key, train.images[:1])["params"]

    def loss(params, images, labels, key):
        _, logits = network.apply({"params": params}, images, True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, images, labels, key):
        grads = jax.grad(loss)(params, images, labels, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for number in range(steps):
        rows = random.choice(len(train), BATCH, replace=False)
        images = _shifted(train.images[rows], random)
        key_of_step = jax.random.fold_in(key, number)
        params, state = step(params, state, images, train.labels[rows], key_of_step)
    return jax.device_get(params)


def _shifted(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Images [N, H, W, C], moved by the same few pixels; their edges are repeated."""
    height, width = images.shape[1:3]
    most = width // SHIFT
    images = np.pad(images, [(0, 0), (most, most), (most, most), (0, 0)], "edge")
    y, x = random.integers(0, 2 * most + 1, 2)
    return images[:, y : y + height, x : x + width]


def epochs(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def bench(argv: list[str]) -> None:
    """Read the flags, train, write and print."""
    parser = cli.Parser(prog="python benchmarks/features.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=["digits", "digits_5_9", "mnist", "emoji"], required=True)
    parser.add_argument("--path", default="", help="for emoji: the folder of benchmarks/emoji.py")
    parser.add_argument("--epochs", type=epochs, default=EPOCHS)
    flags = parser.parse_args(argv[1:])
    train, held_out = load_images(flags.data, flags.path)
    params = train_classifier(train, flags.epochs)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{flags.data}.safetensors"
    with atomic_write(path) as temporary:
        save_file(flax.traverse_util.flatten_dict(params, sep="."), temporary)
    network = Classifier(flags.data)
    shares = [float(np.mean(network(each.images)[1] == each.labels)) for each in (train, held_out)]
    print(f"{path.name}: {shares[1]:.3f} of {len(held_out)} held-out images, ", end="")
    print(f"{shares[0]:.3f} of the training images")
    print(f"SHA-256 {network.sha256}")


if __name__ == "__main__":
    cli.run(bench)
