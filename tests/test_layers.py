"""Imports point downwards only, and nothing is configured through environment variables.

The order, lowest first; a module may import its own layer and those below:

  pallas_kernels    quantized arrays and ops, knows nothing of Gemma
  gemma_jax core    config, model, cache, sampling, generate, text
  convert           checkpoints in and out
  gemma_jax surface what a user touches; its modules are named in SURFACE, all others are core
  bench, tests      may import everything

Imports are read from the syntax trees, so those inside functions count too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "gemma_jax", "convert", "bench")
# The package itself is surface: it re-exports `lm`, so core modules must name each other in full.
SURFACE = {"gemma_jax"} | {
    f"gemma_jax.{name}"
    for name in ("batch", "cli", "doctor", "engine", "info", "lm", "requests", "terminal")
}


def layer_of(module: str) -> int | None:
    """Height of a module of ours, None for everything else."""
    package = module.split(".")[0]
    if package == "gemma_jax":
        surface = module in SURFACE or any(module.startswith(f"{s}.") for s in SURFACE - {package})
        return 3 if surface else 1
    return {"pallas_kernels": 0, "convert": 2, "bench": 4, "tests": 4}.get(package)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")
                base = parents[: len(parents) - node.level + 1]
                source = ".".join([*base, source] if source else base)
            for alias in node.names:  # `from package import module` reaches the module
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if is_module(inner, root) else source
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            target = node.args[0]
            if called in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def upward_imports(root: Path) -> list[str]:
    found = []
    for path in source_files(root, PACKAGES):
        name = module_name(path, root)
        own = layer_of(name)
        assert own is not None
        for line, target in imports_of(path, root):
            layer = layer_of(target)
            if layer is not None and layer > own:
                found.append(f"{path.relative_to(root)}:{line}: {name} imports {target}")
    return found


def own_variables(root: Path) -> list[str]:
    """Places that name a variable GEMMA… in a file that touches the environment."""
    found = []
    for path in source_files(root, (*PACKAGES, "tests")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
        names = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "name")}
        if names & {"environ", "environb", "getenv", "getenvb"}:
            found += [
                f"{path.relative_to(root)}:{node.lineno}: {node.value}"
                for node in nodes
                if isinstance(node, ast.Constant)
                and re.fullmatch(r"GEMMA[A-Z0-9_]*", str(node.value))
            ]
    return found


def source_files(root: Path, packages: tuple[str, ...]) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_every_package_is_there_to_be_read() -> None:
    assert [name for name in PACKAGES if not source_files(ROOT, (name,))] == []
    modules = {module_name(path, ROOT) for path in source_files(ROOT, ("gemma_jax",))}
    assert modules >= SURFACE, "SURFACE names a module that is gone"


def test_imports_point_downwards_only() -> None:
    assert upward_imports(ROOT) == []


def test_no_module_reads_an_environment_variable_of_our_own() -> None:
    assert own_variables(ROOT) == []


def test_importing_the_package_imports_neither_orbax_nor_convert() -> None:
    program = (
        "import sys, gemma_jax\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('orbax', 'convert', 'bench')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("file", "text", "target"),
    [
        ("pallas_kernels/op/xla.py", "import gemma_jax.config", "gemma_jax.config"),
        ("pallas_kernels/op/xla.py", "from gemma_jax import config", "gemma_jax.config"),
        ("gemma_jax/model.py", "def f():\n    from convert.load import g", "convert.load"),
        ("gemma_jax/model.py", "from .lm import load", "gemma_jax.lm"),
        ("gemma_jax/model.py", "from . import lm", "gemma_jax.lm"),
        ("gemma_jax/model.py", "import gemma_jax", "gemma_jax"),
        ("gemma_jax/model.py", "from gemma_jax import load", "gemma_jax"),
        ("gemma_jax/sub/deep.py", "from ..lm import load", "gemma_jax.lm"),
        ("gemma_jax/model.py", "import importlib\nimportlib.import_module('convert')", "convert"),
        ("convert/load.py", "class A:\n    import gemma_jax.cli", "gemma_jax.cli"),
        ("gemma_jax/lm.py", "if True:\n    from bench import aot", "bench"),
        ("convert/load.py", "import tests.data", "tests.data"),
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(
    tmp_path: Path, file: str, text: str, target: str
) -> None:
    write(tmp_path, {"gemma_jax/config.py": "", "gemma_jax/lm.py": "", file: text})
    [found] = upward_imports(tmp_path)
    assert found.startswith(f"{file}:")
    assert found.endswith(f" imports {target}")


def test_downward_imports_pass(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "pallas_kernels/op/__init__.py": "from . import xla\nfrom .. import arrays\nimport jax",
            "pallas_kernels/op/xla.py": "from pallas_kernels.arrays import Q4K",
            "pallas_kernels/arrays.py": "import numpy.convert, gemma_jaxlike",
            "gemma_jax/__init__.py": "from gemma_jax.lm import load",
            "gemma_jax/lm.py": "def load():\n    import convert.load\n    from .config import A",
            "gemma_jax/config.py": "import pallas_kernels",
            "convert/load.py": "from gemma_jax.config import A\nfrom gemma_jax import config",
            "bench/run.py": "import gemma_jax, convert, pallas_kernels, tests",
        },
    )
    assert upward_imports(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['GEMMA_KERNEL']",
        "import os\nos.environ.get('GEMMA')",
        "from os import getenv\ngetenv('GEMMA_JAX_CACHE', '')",
        "import os\nNAME = 'GEMMA_X'\nvalue = os.environ.get(NAME)",
        "from os import environ as e\n'GEMMA_X' in e",
    ],
)
def test_a_variable_of_our_own_is_found(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"gemma_jax/model.py": text})
    assert len(own_variables(tmp_path)) == 1


def test_other_variables_and_other_words_pass(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "gemma_jax/model.py": "import os\nos.environ['XLA_FLAGS'] = 'gemma'",
            "gemma_jax/cli.py": "NAME = 'GEMMA'",
        },
    )
    assert own_variables(tmp_path) == []
