import math
from random import Random

import pytest

from tuning.named_spaces import SPACES
from tuning.space import (
    SweepError,
    check_buildable,
    check_space,
    choice,
    combinations,
    contains,
    describe,
    draw,
    integer,
    load_space,
    logint,
    loguniform,
    uniform,
)


def test_every_named_space_gives_a_reason_for_each_range():
    assert set(SPACES) == {"default", "paper", "size", "offsets"}
    for name, make in SPACES.items():
        assert check_space(make())
        if name != "paper":  # it takes its ranges from default
            assert all(f"{parameter}: " in make.__doc__ for parameter in make())


def test_finite_spaces_are_listed_and_others_are_not():
    space = {"a": choice([1, 2]), "b": integer(3, 4)}
    assert combinations(space) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert combinations(space | {"c": uniform(0, 1)}) is None
    assert combinations({name: integer(1, 100) for name in "abc"}) is None


def test_a_space_contains_what_it_could_propose():
    space = {"a": choice([True, "x"]), "b": integer(3, 5), "c": loguniform(0.1, 1)}
    assert contains(space, {"a": "x", "b": 5, "c": 0.1})
    for wrong in ({"a": "y"}, {"b": 6}, {"b": True}, {"b": "4"}, {"c": None}, {"c": 0.05}):
        assert not contains(space, {"a": "x", "b": 5, "c": 0.1} | wrong)


def test_drawn_settings_lie_in_the_space():
    space = {"a": choice([1, 2]), "b": logint(3, 50), "c": loguniform(0.1, 1), "d": uniform(-1, 1)}
    random = Random(0)
    assert all(contains(space, draw(space, random)) for _ in range(100))


def test_a_space_that_cannot_be_built_names_the_reasons():
    space = {"kernel": choice([5, 7])}
    with pytest.raises(SweepError, match="got none among 2: 5 does not divide 64; 7 does not divide 64"):
        check_buildable(space, lambda values: f"{values['kernel']} does not divide 64")
    with pytest.raises(SweepError, match="got none among 200: never"):
        check_buildable({"c": uniform(0, 1)}, lambda values: "never")
    assert check_buildable(space, lambda values: "no" if values["kernel"] == 5 else None) == 1
    assert check_buildable({"c": uniform(0, 1)}, lambda values: None) is None


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
    space, constraint = load_space(file)
    assert space == {"model.blocks": choice([4, 8]), "train.learning_rate": loguniform(1e-5, 1e-3)}
    assert constraint is None


def test_a_file_may_define_a_constraint(tmp_path):
    file = tmp_path / "mine.py"
    head = "from tuning.space import choice\nSPACE = {'a': choice([1, 2, 3, 4])}\n"
    tests = ["if v['a'] == 2:", "    return 'two'", "if v['a'] == 3:", "    return 3", "if v['a'] == 4:", "    v['x']"]
    body = "\n    ".join(tests)
    file.write_text(f"{head}def CONSTRAINT(v):\n    {body}")
    _, constraint = load_space(file)
    assert constraint({"a": 1}) is None and constraint({"a": 2}) == "two"
    with pytest.raises(SweepError, match=r"mine.py: CONSTRAINT.*expected None or a reason, got 3"):
        constraint({"a": 3})
    with pytest.raises(SweepError, match=r"mine.py: CONSTRAINT.*line 9: KeyError: 'x'"):
        constraint({"a": 4})


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
        ("SPACE = {}\nCONSTRAINT = 3\n", "expected a function CONSTRAINT"),
    ],
)
def test_wrong_files_give_one_line_with_the_files_name(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SweepError, match=message) as caught:
        load_space(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
