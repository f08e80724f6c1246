"""What is in the repository: only what belongs there, and nothing that ties it to one machine or network."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    ".ci",
    ".editorconfig",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "cluster.yaml",
    "constraints.txt",
    "docs",
    "pipelines",
    "preprocessing",
    "pyproject.toml",
    "sdan",
    "tests",
    "tuning",
}
# Written so that this file does not find itself.
MACHINE_PATH = re.compile("(?<![\\w.~$}-])/(home/(?!ubuntu)" + "|Users/|r" + "oot/|w" + "ork/|mnt/|media/)\\w+")
PACKAGE_INDEX = re.compile(
    "(index"
    + "-url|trusted"
    + "-host|find"
    + "-links|https?://\\S*(/simple\\b|pypi|pythonhosted|artifactory|nexus|jfrog|mirror))",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def lines_that_match(pattern: re.Pattern[str], files: list[str]) -> list[str]:
    found = []
    for name in files:
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue  # a picture or weights
        found += [f"{name}: {line.strip()}" for line in text.splitlines() if pattern.search(line)]
    return found


def test_no_machine_paths(tracked):
    assert lines_that_match(MACHINE_PATH, tracked) == []


def test_no_package_index(tracked):
    assert lines_that_match(PACKAGE_INDEX, tracked) == []
    assert not [name for name in tracked if Path(name).name in ("pip.conf", "uv.toml", ".npmrc", ".pypirc", ".env")]


@pytest.mark.parametrize(
    ("pattern", "line", "matches"),
    [
        (MACHINE_PATH, "data = '/ho" + "me/alice/data'", True),
        (MACHINE_PATH, "PYTHONPATH=/wo" + "rk/main", True),
        (MACHINE_PATH, "cd /home/ubuntu/sdan", False),
        (MACHINE_PATH, "s3://bucket/wo" + "rk/main and ~/wo" + "rk/x", False),
        (PACKAGE_INDEX, "pip install --index" + "-url https://example.org/x", True),
        (PACKAGE_INDEX, "https://packages.example.org/sim" + "ple/torch", True),
        (PACKAGE_INDEX, "https://docs.ray.io/en/latest", False),
    ],
)
def test_the_patterns_find_what_they_should(pattern, line, matches):
    assert bool(pattern.search(line)) == matches


def test_top_level_holds_only_what_belongs_there(tracked):
    assert {name.partition("/")[0] for name in tracked} <= TOP_LEVEL


def test_no_caches_or_data_are_tracked(tracked):
    wrong = re.compile(r"(^|/)(data|__pycache__|\.venv|mlruns|mlartifacts|.*\.egg-info)/|\.(pyc|ckpt|pt|pkl|db)$")
    assert [name for name in tracked if wrong.search(name)] == []


def test_files_are_named_after_what_they_do(tracked):
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "base.py", "manager.py", "misc.py"}
    assert [name for name in tracked if Path(name).name in vague] == []


def test_test_files_have_names_of_their_own(tracked):
    names = Counter(Path(name).name for name in tracked if name.startswith("tests/") and "test_" in name)
    assert [name for name, count in names.items() if count > 1] == []
    assert [name for name in tracked if re.match(r"(tests|benchmarks)/(.*/)?__init__\.py", name)] == []


def paths_in_map(readme: str) -> list[str]:
    """Under the heading that says 'map': paths in backticks, and names of files and folders in an indented block."""
    section = re.search(r"^#+ [^\n]*\bmap\b[^\n]*\n(.*?)(?=^#+ |\Z)", readme, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    if section is None:
        return []
    ticked = re.findall(r"`([^`\n]+)`", section[1])
    block = " ".join(re.findall(r"^(?: {4}|\t)(.+)$", section[1], re.MULTILINE))
    listed = re.findall(
        r"(?<!\S)[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|toml|txt|yaml|html|json|safetensors))(?!\S)", block
    )
    return [name for name in ticked if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and re.search("[/.]", name)] + listed


def test_file_map_lists_what_exists():
    paths = paths_in_map((ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 40
    missing = [path for path in paths if not (ROOT / path).exists() and not list(ROOT.glob(f"[!.]*/**/{path}"))]
    assert missing == []


def test_the_map_is_read_as_it_is_written():
    readme = "# X\n`a.py`\n## File map\n| `sdan/network.py` | the `forward` |\n| `pipelines/` | x |\n## Next\n`b.py`"
    assert paths_in_map(readme) == ["sdan/network.py", "pipelines/"]
    block = "## File map\n\n    sdan/   network.py the figures, ops/warp.py e.g. this\n\nText about a/b.py"
    assert paths_in_map(block) == ["sdan/", "network.py", "ops/warp.py"]
