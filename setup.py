from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="tubelet",
    version="0.1.0",
    description="Self-supervised pretraining of video encoders: V-JEPA, its masks, probes and encoders.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    install_requires=[
        "av",
        "decord2",
        "einops",
        "fsspec",
        "matplotlib",
        "numpy>=2",
        "pyarrow>=15",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "submitit",
        "tensorboard",
        "timm",
        "torch>=2.11",
        "torchmetrics",
        "torchvision",
        "tqdm",
    ],
    extras_require={
        "gs": ["gcsfs"],
        "hf": ["huggingface_hub"],
        "http": ["aiohttp"],
        "s3": ["s3fs"],
        "test": [
            "aiohttp",
            "flask",
            "flask-cors",
            "moto[s3]",
            "mypy",
            "pytest",
            "pytest-timeout",
            "ruff",
            "s3fs",
            "scikit-learn",
            "torchcodec",
            "transformers",
            "types-PyYAML",
            "types-tqdm",
            "webdataset",
        ],
    },
)
