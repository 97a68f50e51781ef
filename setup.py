"""Packaging. The folder kernels/ is installed as ddpm_fast.kernels and under no other name."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (ROOT / "ddpm_fast/__init__.py").read_text().splitlines() if "__version__ =" in line
)
TEST = [
    "setuptools>=77",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-benchmark>=4",
    "hypothesis>=6",
    "scipy>=1.11",
    "scikit-learn>=1.4",
]
BENCH = ["matplotlib>=3.8"]

setup(
    name="ddpm_fast",
    version=VERSION,
    description="Exact DDPM samples, fast: fused Triton kernels, CUDA graphs, the same images on a CPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The ddpm_fast authors",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "ddpm_fast",
        "ddpm_fast.adapters",
        "ddpm_fast.cli",
        "ddpm_fast.data",
        "ddpm_fast.engine",
        "ddpm_fast.kernels",
        "ddpm_fast.models",
        "ddpm_fast.speculation",
        "ddpm_fast.training",
    ],
    package_dir={"ddpm_fast": "ddpm_fast", "ddpm_fast.kernels": "kernels"},
    package_data={"ddpm_fast": ["py.typed", "weights/*/*"]},
    install_requires=[
        "torch>=2.8",
        'triton>=3.4; platform_system == "Linux"',
        "numpy>=1.26",
        "einops>=0.8",
        "pillow>=10.1",
        "safetensors>=0.8",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "dev": [*TEST, *BENCH, "ruff==0.17.6", "mypy==2.4.1"],
        "diffusers": ["diffusers>=0.42"],
        "lucidrains": ["denoising-diffusion-pytorch>=2.3.4"],
    },
    entry_points={"console_scripts": ["ddpm-fast = ddpm_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
