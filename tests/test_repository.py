"""What is in the repository: only what belongs there, nothing that ties it to one machine, and docs that name only
what exists."""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import typer

from pipelines import cli

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
    "cluster-local.yaml",
    "cluster.yaml",
    "constraints.txt",
    "deploy",
    "docs",
    "k8s",
    "pipelines",
    "preprocessing",
    "pyproject.toml",
    "sdan",
    "tests",
    "tuning",
}
# The patterns are split so that they do not match this file.
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


def test_test_file_names_are_unique(tracked):
    names = Counter(Path(name).name for name in tracked if name.startswith("tests/") and "test_" in name)
    assert [name for name, count in names.items() if count > 1] == []
    assert [name for name in tracked if re.match(r"(tests|benchmarks)/(.*/)?__init__\.py", name)] == []


def test_the_files_to_start_with_exist(tracked, pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert set(conftest.LONGEST) <= {Path(name).name for name in tracked}


def code_in(page: str) -> list[str]:
    """Pieces of code in a Markdown page: spans in backticks, indented lines, lines of fenced blocks."""
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```.*?^ *```$", "", page, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.+)$", prose, re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose) + indented + [line for block in fenced for line in block.splitlines()]


def paths_in(page: str) -> set[str]:
    """The repository's files and folders that a page names in backticks."""
    spans = [span for span in code_in(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span)]
    return {
        span
        for span in spans
        if span.endswith((".py", ".md", ".toml", ".yaml")) or (span.partition("/")[0] in TOP_LEVEL and "/" in span)
    }


def verbs_in(page: str) -> set[tuple[str, str]]:
    """(verb, option) for each `sdan VERB ... --option`; option "" for the verb itself."""
    found = set()
    for code in code_in(page):
        for verb, rest in re.findall(r"(?:^|[\s/])sdan (?:--data \S+ )?([a-z]+)(?![\w:.])([^#|&;]*)", code):
            found |= {(verb, option) for option in ["", *re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", rest)]}
    return found


@pytest.fixture(scope="module")
def pages(tracked) -> dict[str, str]:
    """The prose that people read, by its file's name; without RESULTS.md, which also uses older names."""
    written = [name for name in tracked if name.endswith(".md") and name != "benchmarks/RESULTS.md"]
    return {name: (ROOT / name).read_text() for name in written}


def test_pages_name_only_files_that_exist(pages, tracked):
    known = {*tracked, *(f"{parent}/" for name in tracked for parent in Path(name).parents)}
    names = {Path(name).name for name in tracked}
    missing = [
        f"{page}: {path}"
        for page, text in pages.items()
        for path in sorted(paths_in(text))
        if path not in known and f"{path}/" not in known and path not in names
    ]
    assert missing == []


def test_links_between_pages_have_a_target(pages):
    dead = [
        f"{page}: {link}"
        for page, text in pages.items()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert dead == []


def test_pages_name_only_make_targets_that_exist(pages):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (page, word)
        for page, text in pages.items()
        for code in code_in(text)
        for call in re.findall(r"^make ((?:[a-z-]+\b(?!=) ?)+)", code)
        for word in call.split()
    }
    assert {page for page, _ in named} >= {"README.md", "CONTRIBUTING.md", "tests/README.md"}
    assert sorted(name for name in named if name[1] not in targets) == []


def test_pages_name_only_verbs_and_options_that_exist(pages):
    commands = typer.main.get_command(cli.app).commands
    options = {
        verb: {"", *(name for item in command.params for name in item.opts)} for verb, command in commands.items()
    }
    named = {(page, *call) for page, text in pages.items() for call in verbs_in(text)}
    assert sorted(name for name in named if name[2] not in options.get(name[1], ())) == []
    alone = {span for text in pages.values() for span in code_in(text) if re.fullmatch(r"--[a-z0-9-]+", span)}
    assert alone - set().union(*options.values()) - {"--data"} == set()


def test_readme_lists_every_verb_in_1300_words(pages):
    verbs = {verb for verb, _ in verbs_in(pages["README.md"])}
    assert set(typer.main.get_command(cli.app).commands) - verbs == set()
    assert len(pages["README.md"].split()) <= 1300


def test_file_map_lists_every_module(pages, tracked):
    modules = {
        name
        for name in tracked
        if re.match(r"(preprocessing|sdan|tuning|pipelines)/.*\.py$", name)
        and not name.endswith("/__init__.py")
        and "/scenery/" not in name
    }
    assert sorted(modules - paths_in(pages["CONTRIBUTING.md"])) == []


def test_method_page_names_code_that_exists(pages, tracked):
    sources = "\n".join(
        (ROOT / name).read_text() for name in tracked if re.match(r"(preprocessing|sdan|pipelines)/.*py$", name)
    )
    code = {span for span in code_in(pages["docs/method.md"]) if re.fullmatch(r"[A-Za-z_][\w.]*", span)}
    words = {word for span in code - paths_in(pages["docs/method.md"]) for word in span.split(".")}
    assert len(words) > 40
    assert sorted(word for word in words if not re.search(rf"\b{word}\b", sources)) == []


def test_troubleshooting_quotes_messages_that_exist(pages, tracked):
    sources = [name for name in tracked if re.match(r"(preprocessing|sdan|tuning|pipelines|\.ci)/.*\.py$", name)]
    texts = [
        node.value
        for name in sources
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    first_cells = re.findall(r"^\| (.*?) \|", pages["docs/troubleshooting.md"], re.MULTILINE)
    quoted = [
        span for cell in first_cells for span in re.findall(r"`([^`]+)`", cell) if not span.startswith("--exclude")
    ]
    assert len(quoted) > 40
    assert [span for span in quoted if not any(span in text for text in texts)] == []


def test_code_is_read_from_pages_as_written():
    page = "Run `make demo`, see `a/b.py`.\n\n    sdan --data D train SHARDS --init x  # --no\n\n```\nsdan ui\n```\n"
    page += "`sdan: x`"
    assert code_in(page) == ["make demo", "a/b.py", "sdan: x", "sdan --data D train SHARDS --init x  # --no", "sdan ui"]
    assert verbs_in(page) == {("train", ""), ("train", "--init"), ("ui", "")}
    assert paths_in("`docs/x.png` `x.py` `data/runs/x` `docs` `docs/`") == {"docs/x.png", "x.py", "docs/"}
