"""Damaged files give rows or a one-line reason, in the fuzzer and in a real run. The fuzzer detects violations."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import mutants
import pytest
from known_scene import write_sequence

from preprocessing.pairs import PairResult
from preprocessing.schema import list_shards


def test_damaged_files_give_rows_or_a_clear_reason(tmp_path):
    outcomes = fuzz.run(seed=5, count=60, keep=tmp_path)
    assert sum(outcomes.values()) == 60 and not list(tmp_path.iterdir()), outcomes
    assert outcomes["rows"] > 5 and outcomes["refused"] > 20, outcomes


def test_mutants_depend_only_on_the_seed():
    def draw(seed):
        makers = mutants.mutants([b"II*\0" + bytes(range(200))], [b"\xff\xd8\xff\xc0" + bytes(100)], seed)
        return [next(makers) for _ in range(40)]

    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize(
    ("limits", "expected"), [({"LIMIT_MIB": 1}, "too much memory"), ({"LIMIT_S": 0.0005}, "too long")]
)
def test_fuzzer_detects_slow_and_large_files(tmp_path, monkeypatch, limits, expected):
    for name, value in limits.items():
        monkeypatch.setattr(fuzz, name, value)
    outcomes = fuzz.run(seed=5, count=2, keep=tmp_path)
    assert outcomes == {f"failed: {expected}": 2} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        ("quarantined", "00001/a.dng: expected a Bayer RAW, got X-Trans; exclude it", "refused"),
        ("quarantined", "00001/a.dng: the decoder crashed on it (SIGSEGV); exclude it", "crashed"),
        ("quarantined", "00001/a.dng: KeyError: 'x'", "unclear reason"),
        ("quarantined", "00001/a.dng: two\nlines", "unclear reason"),
        ("quarantined", "x" * 401, "unclear reason"),
        ("unreadable", "00001/a.dng: cannot be read; run again", "unclear reason"),
        ("died", "00001/a.dng: took longer than 20 s", "too long"),
        ("written", "", "rows"),
    ],
)
def test_fuzzer_judges_reasons(status, reason, expected):
    outcome = fuzz.judge(PairResult("00001_a-b", status, reason), peak_mib=100)
    assert outcome.what == expected and outcome.failed == (expected in ("unclear reason", "too long"))


def test_fuzzer_detects_a_raising_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "make_plan", lambda *_: 1 / 0)
    assert fuzz.run(seed=5, count=3, keep=tmp_path) == {"failed: driver": 3}


def _hard_cases(good_raw, good_jpg):
    """name -> (suffix, bytes) of files that are hard for decoders."""
    rng = random.Random(1)
    cases = {
        "empty": ("dng", b""),
        "half": ("dng", good_raw[: len(good_raw) // 2]),
        "huge": ("dng", good_raw),
        "loop": ("dng", mutants.directory_loop(good_raw, rng)),
        "order": ("dng", b"MM\0*" + good_raw[4:]),
        "offset": ("dng", good_raw),
        "jpg-huge": ("JPG", good_jpg),
        "jpg-cut": ("JPG", good_jpg[:-700]),
        "jpg-empty": ("JPG", b""),
    }
    for name, tags, value in (("huge", mutants.DIMENSIONS, 65_535), ("offset", (273,), (1 << 32) - 16)):
        data = good_raw
        for entry in mutants.entries(data):
            if entry.tag in tags:
                data = mutants.with_field(data, entry.at + 8, "<I", value)
        cases[name] = ("dng", data)
    (frame,) = (at for at in mutants.segments(good_jpg) if good_jpg[at + 1] in (0xC0, 0xC2))
    cases["jpg-huge"] = ("JPG", mutants.with_field(good_jpg, frame + 5, ">I", 0xFFDCFFDC))
    return cases


@pytest.mark.slow
def test_hard_cases_are_set_aside_in_a_real_run(tmp_path):
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    write_sequence(raw / "good", seed=1, focals_mm=(240, 50))
    good = {suffix: (raw / "good" / f"00002.{suffix}").read_bytes() for suffix in ("dng", "JPG")}
    cases = _hard_cases(good["dng"], good["JPG"])
    for name, (suffix, data) in cases.items():
        shutil.copytree(raw / "good", raw / name)
        (raw / name / f"00002.{suffix}").write_bytes(data)
    command = [str(Path(sys.executable).with_name("sdan")), "--data", str(tmp_path / "data"), "preprocess"]
    command += [str(raw), str(shards), "--tile", "24", "--stride", "16", "--val", "good"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list_shards(str(shards))) == 1, done.stdout
    for name in cases:
        assert f"set aside: {name} " in done.stdout, (name, done.stdout)
