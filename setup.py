"""Package metadata. Tool settings live in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read ``__version__`` from the source text: importing the package would need torch."""
    text = (ROOT / "ssdtrain_plugin" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("ssdtrain_plugin/version.py holds no line `__version__ = ...`")
    return match.group(1)


setup(
    name="ssdtrain-plugin",
    version=read_version(),
    description="Activation offloading to NVMe for LLM training: a plugin for DeepSpeed, Megatron and plain PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["ssdtrain_plugin", "ssdtrain_plugin.*"]),
    package_data={"ssdtrain_plugin": ["py.typed"]},
    entry_points={"console_scripts": ["ssdtrain = ssdtrain_plugin.cli:main"]},
    install_requires=[
        "torch>=2.6,<3",
        "pydantic>=2.7,<3",
        "typer>=0.12,<1",
        "rich>=13,<16",
        "PyYAML>=6,<7",
        "sortedcontainers>=2.4,<3",
        "xxhash>=3.4,<4",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.16,<1"],
        # From 0.18 on it imports triton, which comes with torch's CUDA builds only.
        "megatron": [
            "megatron-core>=0.16.1,<1",
            "triton; python_version >= '3.12' and sys_platform == 'linux'",
        ],
        "gds": ["kvikio-cu12>=25.4"],
        "bench": ["matplotlib>=3.8,<4", "scipy>=1.11,<2"],
        "dev": [
            "matplotlib>=3.8,<4",
            "scipy>=1.11,<2",
            "pytest>=8,<10",
            "pytest-randomly>=3.15,<6",
            "pytest-timeout>=2.3,<3",
            "hypothesis>=6.100,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2,<3",
            "types-PyYAML>=6,<7",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
