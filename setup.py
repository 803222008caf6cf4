"""Package metadata; build and tool settings live in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "piflow" / "__init__.py").read_text())[1]

DIFFUSERS = [
    "diffusers>=0.42,<0.43",
    "transformers>=5,<6",
    "accelerate>=1.10",
    "peft>=0.21",
    "safetensors>=0.6",
    "huggingface_hub>=1",
    "typer>=0.20",  # the `piflow` command
]
TRAINING = [
    *DIFFUSERS,
    "deepspeed>=0.19.8",
    "ninja",
    "psutil>=5",
    "pydantic>=2.10",
    "PyYAML>=6",
    "rich>=13",
    "tensorboard>=2.18",
]
DATA = ["datasets>=4"]  # only where prompts come from a Hugging Face dataset, CSV or Parquet
WANDB = ["wandb>=0.31,<0.32"]  # only where `logging.wandb` is set
EVALUATION = [*DIFFUSERS, "numpy", "pydantic>=2.10", "scikit-learn>=1.5", "scipy>=1.13", "matplotlib>=3.9", "rich>=13"]
QUANTIZATION = ["bitsandbytes>=0.50", "torchao>=0.18", "gguf>=0.19"]  # bases only; installed, they slow every import
APPS = [*DIFFUSERS, "gradio>=6.31,<7", "rich>=13"]
DOCS = ["sphinx>=9", "myst-parser>=5", "furo>=2025.9"]
DEVELOPMENT = [
    "numpy",
    "pytest>=9",
    "pytest-benchmark>=5.2",
    "hypothesis>=6.150",
    "ruff>=0.17",
    "mypy>=2",
    "types-PyYAML",
    "kernels>=0.17,<0.18",
    "playwright>=1.60",  # drives the web demo in a real browser
]


class BuildWithConfigs(build_py):
    """The recipes go along into the wheel as piflow/configs, so that `piflow demo` needs no checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "configs", Path(self.build_lib, "piflow", "configs"), dirs_exist_ok=True)


setup(
    name="piflow",
    version=VERSION,
    description="Triton kernels, sampler and trainer for pi-Flow: policy-based few-step generation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["piflow", "piflow.*", "piflow_kernels", "piflow_kernels.*"]),
    package_data={
        "piflow": ["py.typed", "digits/weights/*/*.safetensors", "digits/weights/*/*.json"],
        "piflow_kernels": ["py.typed", "metadata.json"],
    },
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "diffusers": DIFFUSERS,
        "training": TRAINING,
        "data": DATA,
        "wandb": WANDB,
        "evaluation": EVALUATION,
        "apps": APPS,
        "quantization": QUANTIZATION,
        "docs": DOCS,
        "dev": DEVELOPMENT,
        "all": sorted({*TRAINING, *DATA, *WANDB, *EVALUATION, *APPS, *DOCS, *DEVELOPMENT}),
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["piflow=piflow.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
