"""Package metadata. Exact versions live in requirements.txt; ruff's and pytest's settings in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def pinned(file: str) -> list[str]:
    """The requirements of a file, without comments."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


setup(
    name="gram-engine",
    version="0.1.0",
    description="A training engine for generative foundation reward models (GRAM) on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["gram_engine", "gram_engine.*"]),
    package_data={"gram_engine.data": ["templates/*.yaml"]},
    install_requires=pinned("requirements.txt"),
    extras_require={
        "dev": pinned("requirements-dev.txt"),
        # megatron-core 0.16.1 asks for transformer-engine >= 2.9, < 2.12; both compile on install.
        "gpu": ["transformer-engine[core_cu13,pytorch]==2.11.0", "flash-attn==2.8.3"],
        "wandb": ["wandb==0.31.0"],
        "hub": ["datasets==5.2.0"],
    },
    entry_points={"console_scripts": ["gram = gram_engine.cli:main"]},
)
