"""Which package, folder and file may import which. The syntax tree is read, so imports inside functions count, too."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("preprocessing", "sdan", "tuning", "pipelines")
LEARNING = {"torch", "torchvision", "triton", "lpips", "safetensors", "onnx"}
PICTURES = {"rawpy", "cv2", "exifread", "PIL"}
TRACKING = {"mlflow", "optuna"}

SIMULATOR = "preprocessing.simulator"
SIMULATOR_USERS = ("preprocessing/simulator/", "pipelines/cli.py", "pipelines/demo.py")
"""The only files and folders that may import the simulator, which makes test data; production code must not need it."""

# package -> (top-level names that none of its files may import, {name: the only files that may})
RULES = {
    "preprocessing": (
        LEARNING | TRACKING | {"sdan", "tuning", "pipelines"},
        {"ray": ("preprocessing/shards.py",)},
    ),
    "sdan": (
        PICTURES | TRACKING | {"ray", "pyarrow", "pandas", "boto3", "botocore", "preprocessing", "tuning", "pipelines"},
        {"triton": ("sdan/ops/",)},
    ),
    "tuning": (
        LEARNING | PICTURES - {"PIL"} | {"pyarrow", "preprocessing", "sdan", "pipelines"},
        {},
    ),
    "pipelines": ({"triton", "tests", "benchmarks"}, {}),
}


def package_sources() -> dict[str, str]:
    """{'sdan/network.py': its text, ...} of the four packages."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imported(file: str, text: str, modules: set[str]) -> set[str]:
    """Dotted names that a file imports, even inside functions; `from a import b` is a.b if that is a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text, file)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(file, node)
            names.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def _absolute(file: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = Path(file).parent.parts[: len(Path(file).parent.parts) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def module_of(file: str) -> str:
    """sdan/ops/__init__.py -> sdan.ops."""
    return ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")


def forbidden(sources: dict[str, str]) -> list[str]:
    """Imports that RULES do not allow."""
    modules = {module_of(file) for file in sources}
    found = []
    for file, text in sources.items():
        never, only = RULES[file.partition("/")[0]]
        for name in sorted(imported(file, text, modules)):
            top = name.partition(".")[0]
            allowed = only.get(top)
            if top in never or (allowed is not None and not file.startswith(allowed)):
                found.append(f"{file} imports {name}")
    return found


def simulator_imports(sources: dict[str, str]) -> list[str]:
    """Imports of the simulator by files that may not use it."""
    modules = {module_of(file) for file in sources} | {SIMULATOR}
    return [
        f"{file} imports {name}"
        for file, text in sources.items()
        if not file.startswith(SIMULATOR_USERS)
        for name in sorted(imported(file, text, modules))
        if f"{name}.".startswith(f"{SIMULATOR}.")
    ]


def room_of(file: str) -> str:
    """The folder below the package that a file is in, e.g. sdan/ops; the file itself if it is directly in a package."""
    parts = Path(file).parts
    return "/".join(parts[:2])


def graph(sources: dict[str, str], node_of: Callable[[str], str]) -> dict[str, set[str]]:
    """node -> the other nodes that it imports; `node_of` gives the node of a file."""
    nodes = {module_of(file): node_of(file) for file in sources}
    edges: dict[str, set[str]] = {node: set() for node in nodes.values()}
    for file, text in sources.items():
        own = node_of(file)
        edges[own] |= {nodes[name] for name in imported(file, text, set(nodes)) if name in nodes} - {own}
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of one cycle, with the first repeated at the end; [] if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def test_every_import_is_allowed():
    assert forbidden(package_sources()) == []


def test_no_cycles_between_files():
    assert cycle(graph(package_sources(), module_of)) == []


def test_no_cycles_between_rooms():
    """A room is a folder below a package; a file directly in a package counts as a room."""
    assert cycle(graph(package_sources(), room_of)) == []


def test_no_cycles_between_packages():
    edges = graph(package_sources(), lambda file: file.partition("/")[0])
    assert cycle(edges) == []
    assert all("pipelines" not in targets for targets in edges.values())


def test_only_simulate_and_demo_import_the_simulator():
    assert simulator_imports(package_sources()) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("preprocessing/tiles.py", "import torch"),
        ("preprocessing/tiles.py", "def late():\n    from torch.nn import functional"),
        ("preprocessing/tiles.py", "import ray.data"),
        ("preprocessing/tiles.py", "from sdan import metrics"),
        ("preprocessing/tiles.py", "import importlib\nimportlib.import_module('torch')"),
        ("sdan/network.py", "import mlflow"),
        ("sdan/network.py", "if True:\n    import triton.language as tl"),
        ("sdan/ops/reference.py", "from preprocessing import schema"),
        ("sdan/network.py", "import rawpy"),
        ("tuning/sweep.py", "from pipelines.train import train"),
        ("tuning/sweep.py", "from ..sdan import network"),
        ("pipelines/train.py", "from tests import helpers"),
    ],
)
def test_forbidden_imports_are_found(file, text):
    assert len(forbidden({file: text})) == 1


def test_allowed_imports_are_accepted():
    sources = {
        "preprocessing/shards.py": "import ray.data\nfrom preprocessing import schema",
        "sdan/ops/triton_kernels.py": "import triton",
        "sdan/network.py": "from . import losses\nfrom .ops import squared_deform_conv2d",
        "pipelines/train.py": "import ray, torch, mlflow\nfrom sdan.network import SDAN",
    }
    assert forbidden(sources) == []


def test_cycles_are_found():
    sources = {
        "sdan/a.py": "from sdan import b",
        "sdan/b.py": "def late():\n    from sdan.c import thing",
        "sdan/c.py": "from . import a",
    }
    assert cycle(graph(sources, module_of)) == ["sdan.a", "sdan.b", "sdan.c", "sdan.a"]
    assert cycle(graph(sources | {"sdan/c.py": "import math"}, module_of)) == []


def test_cycles_between_rooms_are_found():
    sources = {
        "sdan/network.py": "from sdan.ops import kernels",
        "sdan/ops/__init__.py": "",
        "sdan/ops/kernels.py": "import math",
        "sdan/ops/check.py": "from sdan import network",
    }
    assert cycle(graph(sources, module_of)) == []
    assert cycle(graph(sources, room_of)) == ["sdan/network.py", "sdan/ops", "sdan/network.py"]


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("preprocessing/tiles.py", "from preprocessing.simulator import optics", 1),
        ("preprocessing/tiles.py", "from preprocessing import simulator", 1),
        ("pipelines/train.py", "def late():\n    from preprocessing.simulator.sequences import simulate", 1),
        ("preprocessing/tiles.py", "from preprocessing import simulator_notes", 0),
        ("preprocessing/simulator/sensor.py", "from preprocessing.simulator import optics", 0),
        ("pipelines/cli.py", "from preprocessing.simulator import sequences", 0),
    ],
)
def test_imports_of_the_simulator_are_found(file, text, found):
    assert len(simulator_imports({file: text})) == found


IMPORT_ALL = """
import importlib, os, sys
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
import mlflow, ray
assert not ray.is_initialized(), "an import started Ray"
assert mlflow.active_run() is None, "an import started an MLflow run"
assert not mlflow.is_tracking_uri_set(), "an import set MLflow's tracking URI"
assert "torchvision" not in sys.modules, "an import loaded torchvision, which takes 3 s; load it where it is used"
"""


def test_importing_every_module_has_no_side_effects(tmp_path):
    modules = sorted({module_of(file) for file in package_sources()})
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_imports_nothing_heavy():
    heavy = "torch ray mlflow cv2 rawpy pyarrow matplotlib optuna numpy pandas"
    code = f"import sys, pipelines.cli; print(*[name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_installed_command_prints_its_help():
    command = [str(Path(sys.executable).with_name("sdan")), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train" in done.stdout and done.stderr == ""
