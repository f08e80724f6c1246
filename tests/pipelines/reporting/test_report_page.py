import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from report_example import HARMFUL, METHODS, report

from pipelines.reporting.contents import chosen_crops, gain_sentence, tables_of
from pipelines.reporting.histogram import histogram, limits
from pipelines.reporting.page import render, write_report
from pipelines.reporting.pictures import ERROR_LIMIT, error_map, offset_colours, uri
from pipelines.scoring.bootstrap import Interval


def test_the_page_is_whole_in_itself(tmp_path):
    write_report(tmp_path / "report.html", report())
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text and "url(" not in text
    assert HARMFUL not in text and "&lt;script&gt;" in text
    assert "26.40" in text and "RGB in [0, 1]." in text and text.count("<svg") == 1


def test_pictures_are_kept_to_the_bit():
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    packed = base64.b64decode(uri(picture).partition(",")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(packed))), picture)


def test_a_page_without_crops_has_its_tables():
    only_tables = report().__class__(**{**report().__dict__, "crops": []})
    text = render(only_tables)
    assert "26.40" in text and 'id="compare"' not in text


def test_error_colours_grow_with_the_error():
    target = np.full((4, 4, 3), 100, np.uint8)
    light = [int(error_map(target + error, target)[0, 0].sum()) for error in (0, 8, 16, ERROR_LIMIT)]
    assert light == sorted(light) and len(set(light)) == 4
    assert np.array_equal(error_map(target + ERROR_LIMIT, target), error_map(target + 2 * ERROR_LIMIT, target))


def test_offset_colours_do_not_depend_on_other_offsets():
    """One scale for all crops: the same offset has the same colour, whatever else the crop holds."""
    field = np.zeros((2, 4, 5), np.float32)
    field[1] = 1.0
    alone = offset_colours(field, 4.0)
    field[:, 0, 0] = 4.0
    beside = offset_colours(field, 4.0)
    assert alone.shape == (4, 5, 3) and np.array_equal(alone[1:], beside[1:])
    assert not np.array_equal(alone[0, 0], beside[0, 0])
    assert np.array_equal(offset_colours(np.zeros((2, 2, 2), np.float32), 1.0), np.full((2, 2, 3), 255))


def test_best_median_and_worst_crops_are_chosen():
    gains = [0.5, np.nan, -1.0, 0.1, 2.0, 0.3, 0.2, 1.0]
    assert chosen_crops(gains) == {4: "best", 7: "best", 6: "median", 5: "median", 2: "worst", 3: "worst"}
    assert chosen_crops([1.0]) == {0: "best"}
    assert chosen_crops([np.nan, np.nan]) == {}


def test_every_tile_is_in_the_histogram():
    differences = [-1.0, -0.2, 0.4, 0.4, 3.0, np.nan]
    svg = histogram(differences, *limits([differences]), "a label")
    assert sum(int(count) for count in re.findall(r": (\d+) tiles", svg)) == 5
    assert svg.count('class="worse"') == 2
    assert limits([[np.nan]]) == (-0.1, 0.1)


def test_a_markdown_table_becomes_a_table():
    tables, others = tables_of("A title.\n\n| | a |\n| --- | ---: |\n| x | 1 |\n\n| b |\n| --- |\n| 2 |\n\nA note.")
    assert [(list(table.head), list(table.rows)) for table in tables] == [(["", "a"], [["x", "1"]]), (["b"], [["2"]])]
    assert others == ["A title.", "A note."]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Interval(0.5, 0.3, 0.7, 8), "X is 0.50 dB above Y against the true target (95 % interval +0.30 to +0.70"),
        (Interval(-0.5, -0.7, -0.3, 8), "X is 0.50 dB below Y"),
        (Interval(0.1, -0.1, 0.3, 8), "No difference larger than the noise: X is 0.10 dB above"),
        (Interval(0.1, float("nan"), float("nan"), 1), "one sequence only"),
        (Interval(float("nan"), float("nan"), float("nan"), 0), "X has no score"),
    ],
)
def test_a_sentence_says_what_is_more_than_noise(found, said):
    assert said in gain_sentence("X", "Y", "true", found)


def test_both_methods_are_in_the_crops():
    text = render(report())
    for label in METHODS:
        assert text.count(f'data-label="{label}"') == 2
