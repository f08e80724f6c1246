import math

import pytest

from tuning.space import (
    SweepError,
    check_space,
    choice,
    default_space,
    describe,
    integer,
    load_space,
    logint,
    loguniform,
    uniform,
)


def test_default_space_is_the_papers_two_questions():
    assert describe(default_space()) == {
        "loss.align_weight": "loguniform(0.1, 10.0)",
        "model.packing_kernel": "choice([2, 4, 8])",
    }


def test_a_space_is_sorted_so_that_a_seed_repeats_it():
    space = {"b": uniform(0, 1), "a": integer(1, 3)}
    assert list(check_space(space)) == ["a", "b"]
    assert describe(space) == describe(dict(reversed(space.items())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choice([]), "at least one value, got none"),
        (lambda: choice("abc"), "expected a list"),
        (lambda: choice([[1], [2]]), "only bool, int, float or str"),
        (lambda: choice([2, 2]), "expected each value once"),
        (lambda: uniform(1, 1), "low < high"),
        (lambda: uniform("0", 1), "two finite numbers"),
        (lambda: uniform(0, math.inf), "two finite numbers"),
        (lambda: loguniform(0, 1), "low > 0"),
        (lambda: integer(1, 2.5), "two integers"),
        (lambda: logint(0, 4), "low > 0"),
        (lambda: integer(True, 4), "two integers"),
    ],
)
def test_wrong_distributions_are_refused(make, message):
    with pytest.raises(SweepError, match=message):
        make()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "got an empty dict"),
        ([("a", uniform(0, 1))], "expected a dict .* got list"),
        ({"a b": uniform(0, 1)}, "expected a dotted name .* got 'a b'"),
        ({"loss..x": uniform(0, 1)}, "dotted name"),
        ({"loss.align_weight": 3}, "SPACE, loss.align_weight: expected one of choice.*, got 3"),
    ],
)
def test_wrong_spaces_are_refused(space, message):
    with pytest.raises(SweepError, match=message):
        check_space(space)


def test_a_file_defines_the_space_and_its_main_is_not_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tuning.space import choice, loguniform\n"
        "rates = (1e-5, 1e-3)\n"
        "SPACE = {'train.learning_rate': loguniform(*rates), 'model.blocks': choice([4, 8])}\n"
        "if __name__ == '__main__':\n    raise SystemExit('must not run')\n"
    )
    assert load_space(file) == {"model.blocks": choice([4, 8]), "train.learning_rate": loguniform(1e-5, 1e-3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "got none"),
        ("x = 1\n", "got no SPACE"),
        ("SPACE = {}\n", "got an empty dict"),
        ("SPACE = {'a': 1}\n", "SPACE, a: expected .*, got 1"),
        ("\nimport nowhere_to_be_found\n", "line 2: ModuleNotFoundError"),
        ("SPACE = {\n", "SyntaxError"),
        ("x = 1\ny = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("from tuning.space import choice\nSPACE = {'a': choice([])}\n", "at least one value"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_wrong_files_give_one_line_with_the_files_name(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SweepError, match=message) as caught:
        load_space(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
