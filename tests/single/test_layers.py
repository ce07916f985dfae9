"""The layer rule of DESIGN.md, read off the imports; and which module may import what from outside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "hvd_shadowsync"
SOURCES = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((REPOSITORY / PACKAGE).rglob("*.py"))
}
MODULES = sorted(SOURCES)


def short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


def part(module: str) -> str:
    """Return the part of the package that `module` belongs to."""
    return short(module).split(".")[0]


LAYERS = [
    ["rank", "agent"],
    ["errors", "checks", "libraries", "gpus", "ending", "durable", "restarts"],
    ["comm"],
    ["replica", "pacing", "metrics", "owned", "finite"],
    ["algorithms"],
    ["reducers"],
    ["warmup", "average", "ballot", "agree", "alike", "names", "health"],
    ["embedding"],
    ["reduction"],
    ["captured", "staged", "legacy"],
    ["rounds"],
    ["arguments", "shadow", "watch"],
    ["course"],
    ["optimizer"],
    ["distributed", "broadcast"],
    ["torch", "checkpoint"],
    ["checkpointing"],
    ["launcher", "emulated", "run", "doctor", "capacity", "__main__"],
]
"""Parts of the package, the lowest layer first; a part is a module or a folder."""

WITHOUT_TORCH = [
    "errors",
    "checks",
    "comm",
    "comm.agreement",
    "comm.base",
    "comm.job",
    "comm.poll",
    "comm.spares",
    "comm.tuning",
    "pacing",
    "metrics",
    "rank",
    "agent",
    "ending",
    "restarts",
    "emulated",
    "emulated.__main__",
    "emulated.cluster",
    "emulated.delay",
    "emulated.job",
    "emulated.namespaces",
    "emulated.network",
    "run",
    "doctor",
    *(short(module) for module in MODULES if part(module) in ("capacity", "launcher")),
]
OPTIONAL = {
    "mpi4py": {"comm.job", "comm.spares", "__main__"},
    "horovod": {"torch", "__main__"},
    "fbgemm_gpu": {"embedding.kernels.fbgemm"},
    "matplotlib": {"capacity.plot"},
}


def imported(module: str, *, everywhere: bool = True) -> set[str]:
    """Return what `module` imports, at its top or also inside functions; names that are modules as modules."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import, which this test does not read"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in names}
    return found


def ours(module: str) -> set[str]:
    return {name for name in imported(module) if name.split(".")[0] == PACKAGE}


def outside(module: str, *, everywhere: bool = True) -> set[str]:
    """Return the top-level packages that `module` imports from outside."""
    return {name.split(".")[0] for name in imported(module, everywhere=everywhere)} - {PACKAGE}


def test_imports_are_found() -> None:
    assert f"{PACKAGE}.ballot" in ours(f"{PACKAGE}.rounds"), "from hvd_shadowsync import ballot"
    assert f"{PACKAGE}.comm.mpi" in ours(f"{PACKAGE}.__main__"), "inside a function"
    assert "mpi4py" not in outside(f"{PACKAGE}.comm.job", everywhere=False)


def test_every_module_has_a_layer() -> None:
    parts = {part(module) for module in MODULES if module != PACKAGE}
    assert sorted(parts) == sorted(name for layer in LAYERS for name in layer)


def test_the_layers_are_those_of_the_design() -> None:
    text = (REPOSITORY / "DESIGN.md").read_text(encoding="utf-8")
    sentence = re.search(r"Imports go down only: (.*?)\.\s+A test", text, re.DOTALL)
    assert sentence is not None
    written = [re.findall(r"\w+", layer) for layer in sentence[1].split(">")]
    known = {part(module) for module in MODULES}
    layers = [[name for name in layer if name in known] for layer in reversed(written)]
    assert [sorted(layer) for layer in layers] == [
        sorted(name for name in layer if name != "__main__") for layer in LAYERS
    ] + [[]], "the last are launch and examples, which are no part of the package"


@pytest.mark.parametrize("module", [name for name in MODULES if name != PACKAGE], ids=short)
def test_imports_go_down_only(module: str) -> None:
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    above = {name for name in ours(module) if level[part(name)] > level[part(module)]}
    assert not above, f"{short(module)} imports from above: {sorted(map(short, above))}"


def test_there_are_no_cycles() -> None:
    graph = {module: ours(module) - {module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_package_itself_is_imported_by_nobody_inside() -> None:
    assert [module for module in MODULES if PACKAGE in imported(module)] == []


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "algorithms"], ids=short)
def test_algorithms_know_no_threads_no_mpi_and_no_time(module: str) -> None:
    assert outside(module) <= {"__future__", "abc", "collections", "dataclasses", "typing", "torch"}
    assert {part(name) for name in ours(module)} <= {"algorithms", "checks"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_these_modules_import_no_torch(name: str) -> None:
    assert "torch" not in outside(f"{PACKAGE}.{name}", everywhere=False)


@pytest.mark.parametrize("module", ["", ".run", ".emulated.__main__", ".capacity.__main__"])
def test_launchers_and_ranks_that_wait_as_spare_ones_do_without_torch(module: str) -> None:
    done = python(f"""
import sys
import hvd_shadowsync{module}
print(sorted({{"torch", "mpi4py", "horovod"}} & set(sys.modules)))
hvd_shadowsync.ShadowSync
print("torch" in sys.modules)
""")
    assert done.stdout == "[]\nTrue\n", done.stderr


def test_tensorboard_is_imported_where_it_is_needed() -> None:
    users = [short(module) for module in MODULES if any("tensorboard" in name for name in imported(module))]
    assert users == ["metrics"]
    assert "torch" not in outside(f"{PACKAGE}.metrics", everywhere=False)


@pytest.mark.parametrize(("library", "users"), list(OPTIONAL.items()))
def test_optional_libraries_are_imported_in_few_places(library: str, users: set[str]) -> None:
    assert {short(module) for module in MODULES if library in outside(module)} == users


def test_mpi_and_horovod_are_not_needed_to_import_anything_but_the_drop_in() -> None:
    at_once = {short(module) for module in MODULES if {"mpi4py", "horovod"} & outside(module, everywhere=False)}
    top = ast.parse(SOURCES[f"{PACKAGE}.torch"].read_text(encoding="utf-8")).body
    tried = [node for statement in top if isinstance(statement, ast.Try) for node in statement.body]
    assert at_once == set()
    assert any(isinstance(node, ast.Import) and node.names[0].name == "horovod.torch" for node in tried)


def test_nothing_else_is_needed() -> None:
    allowed = {"torch", "numpy", "mpi4py", "horovod", "safetensors", "fbgemm_gpu", "matplotlib"}
    allowed |= set(sys.stdlib_module_names)
    assert {name for module in MODULES for name in outside(module)} <= allowed


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"horovod", "tensorboard", "fbgemm_gpu"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import hvd_shadowsync
print(sorted(name for name in ("horovod", "tensorboard", "mpi4py", "mpi4py.MPI") if name in sys.modules))
print([name for name in hvd_shadowsync.__all__ if not hasattr(hvd_shadowsync, name)])
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_importing_the_package_needs_no_horovod_and_does_not_initialise_mpi() -> None:
    done = python(BLOCKED)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


def test_the_drop_in_says_what_it_lacks() -> None:
    done = python(BLOCKED + "import hvd_shadowsync.torch")
    assert done.returncode == 1
    assert "hvd_shadowsync.torch needs Horovod" in done.stderr
    assert "needs Horovod" in done.stderr and "C++17" in done.stderr
