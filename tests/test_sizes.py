"""Limits that keep the four packages easy to enter: files per folder, lines per function, lines per file."""

import ast
import statistics
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("preprocessing", "sdan", "tuning", "pipelines")
MAX_FILES = 14
"""Python files directly in one folder, __init__.py included."""
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = "triton_kernels.py"
"""Files of this name may have longer functions: a GPU kernel cannot be split without cost."""
MEDIAN_FILE_LINES = (120, 220)


def package_sources() -> dict[str, str]:
    """{'sdan/network.py': its text, ...} of the four packages."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def crowded_folders(files: list[str]) -> list[str]:
    """Folders with more than MAX_FILES Python files."""
    counts = Counter(file.rpartition("/")[0] for file in files)
    return [f"{folder} has {count} files" for folder, count in counts.items() if count > MAX_FILES]


def long_functions(sources: dict[str, str]) -> list[str]:
    """Functions of more than MAX_FUNCTION_LINES lines, from `def` to the last line, docstring included."""
    found = []
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text, file)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or file.endswith(f"/{LONG_FUNCTIONS}"):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{file}: {node.name} has {lines} lines")
    return found


def median_lines(sources: dict[str, str]) -> float:
    """Median number of lines of the files that are not empty."""
    return statistics.median(len(text.splitlines()) for text in sources.values() if text.strip())


def test_no_folder_has_too_many_files():
    assert crowded_folders(list(package_sources())) == []


def test_no_function_is_too_long():
    assert long_functions(package_sources()) == []


def test_files_have_a_readable_length():
    low, high = MEDIAN_FILE_LINES
    assert low <= median_lines(package_sources()) <= high


def test_crowded_folders_are_found():
    files = [f"sdan/module_{number}.py" for number in range(MAX_FILES)]
    assert crowded_folders([*files, "sdan/ops/one.py"]) == []
    assert crowded_folders([*files, "sdan/one_more.py"]) == ["sdan has 15 files"]


def test_long_functions_are_found():
    body = "\n".join(["    pass"] * MAX_FUNCTION_LINES)
    text = f"class A:\n    pass\n\nasync def too_long():\n{body}\n\ndef short():\n    pass\n"
    assert long_functions({"sdan/a.py": text}) == ["sdan/a.py: too_long has 61 lines"]
    assert long_functions({"sdan/ops/triton_kernels.py": text}) == []


def test_empty_files_do_not_count_for_the_median():
    assert median_lines({"a.py": "", "b.py": "1\n2\n", "c.py": "1\n2\n3\n4\n"}) == 3
