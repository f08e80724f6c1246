"""Estimates agree with actual runs; listing opens no file and planning opens each once."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from known_scene import jpg_bytes, write_sequence

from preprocessing import shards
from preprocessing.estimate import Rate, estimate, memory_bytes, num_tiles, require_room_for_a_tile, tile_bytes
from preprocessing.frames import discover
from preprocessing.pairs import process
from preprocessing.plan import PreprocessError, PreprocessOptions, make_plan
from preprocessing.raw.exif import read_exif
from preprocessing.storage import Folder, open_folder

OPTIONS = PreprocessOptions(tile_px=12, stride_px=5)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_sequence(folder / "00001", size=(256, 384))
    write_sequence(folder / "00002", size=(384, 256), raw_format="arw", jpg_margin=4)
    return folder


def test_estimates_agree_with_actual_shards(raw, tmp_path):
    jobs = make_plan(open_folder(str(raw)), OPTIONS, {}).jobs
    results = [process(job, open_folder(str(raw)), open_folder(str(tmp_path)), OPTIONS) for job in jobs]
    assert [result.status for result in results] == ["written"] * 6
    for job, result in zip(jobs, results, strict=True):
        assert num_tiles(job, OPTIONS) == pytest.approx(result.rows, rel=0.3)
    tiles, size = sum(result.rows for result in results), sum(result.bytes for result in results)
    unmeasured = estimate(jobs, OPTIONS, None, 2)
    assert unmeasured.tiles == pytest.approx(tiles, rel=0.2) and unmeasured.seconds is None
    raw_bytes = tiles * tile_bytes(OPTIONS, truth=False)
    measured = estimate(jobs, OPTIONS, Rate(tiles, size, raw_bytes, 60.0), 2)
    assert measured.bytes == pytest.approx(size, rel=0.2)
    assert measured.seconds == pytest.approx(30, rel=0.2)


def test_bytes_of_a_12_megapixel_pair():
    """4240x2832 at 150/35: 40 tiles of 96 packed pixels, as in a real run."""
    exif = read_exif(b"")
    job = _job(replace(exif, size=(2832, 4240)), zoom=150 / 35)
    options = PreprocessOptions()
    assert num_tiles(job, options) == 40
    assert num_tiles(_job(replace(exif, size=(4240, 2832)), zoom=150 / 35), options) == 40  # a JPG stored upright
    assert tile_bytes(options, truth=False) == 8 * 96**2 + 2 * 3 * 192**2 + 3 * 768**2
    assert tile_bytes(options, truth=True) == tile_bytes(options, truth=False) + 3 * 768**2 + (4 + 2) * 96**2


def test_a_tile_that_never_fits_is_refused_at_once():
    exif = read_exif(b"")
    jobs = [_job(replace(exif, size=size), zoom=5.0) for size in ((512, 768), (640, 960))]  # at most 64 x 96
    for tile_px, fits in ((64, True), (68, True), (69, False), (96, False)):
        options = PreprocessOptions(tile_px=tile_px, stride_px=8)
        if fits:
            require_room_for_a_tile(jobs, options)
            continue
        with pytest.raises(PreprocessError, match=f"share, 96x64 packed .*, got {tile_px}; use --tile 64$"):
            require_room_for_a_tile(jobs, options)
    require_room_for_a_tile(jobs, PreprocessOptions(tile_px=72, stride_px=8, align="ecc"))
    require_room_for_a_tile([*jobs, _job(exif, 5.0)], options)  # a size is unknown
    require_room_for_a_tile([], options)


def _job(exif, zoom, pixels=4240 * 2832):
    return shards.PairJob(
        *("00001", "00006", "00002", "train", "0" * 16, "a.ARW", "a.JPG", "b.JPG", None),
        *(exif, exif, zoom, "00001", False, pixels),
    )


def test_memory_request_grows_with_the_frames():
    exif = read_exif(b"")
    small, large = memory_bytes(_job(exif, 4.0, 10**5)), memory_bytes(_job(exif, 4.0, 12_000_000))
    assert 300e6 < small < 600e6 and 0.7e9 < large < 1.3e9
    assert memory_bytes(_job(exif, 4.0, 60_000_000)) > 2.5e9


def test_chunks_have_one_memory_request_within_the_largest_node(monkeypatch):
    exif = read_exif(b"")
    nodes = [
        {"Alive": True, "Resources": {"memory": 4e9}},
        {"Alive": True, "Resources": {"memory": 8e9}},
        {"Alive": False, "Resources": {"memory": 9e12}},
    ]
    monkeypatch.setattr(shards.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(shards.ray, "cluster_resources", lambda: {"CPU": 4.0})
    jobs = [_job(exif, 4.0, 12_000_000 if number % 2 else 100_000) for number in range(2500)]
    jobs.append(_job(exif, 4.0, 10**9))
    chunks = list(shards.chunks(jobs))
    assert [len(chunk) for chunk, _ in chunks] == [1000, 250, 1000, 250, 1]
    assert [memory for _, memory in chunks[:4]] == [float(memory_bytes(chunk[0])) for chunk, _ in chunks[:4]]
    assert chunks[-1][1] == 8e9
    assert [job for chunk, _ in chunks for job in chunk] == sorted(jobs, key=lambda job: job.pixels)


def test_a_damaged_rate_reads_as_none(tmp_path):
    folder = open_folder(str(tmp_path))
    assert Rate.read(folder) is None
    rate = Rate(40, 58_000_000, 83_000_000, 2.5)
    rate.write(folder)
    assert Rate.read(folder) == rate
    zero = b'{"tiles": 0, "bytes": 4, "raw_bytes": 5, "task_seconds": 6.5}'  # would divide by zero
    for text in (b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 10**6, b'{"tiles": 3}', zero):
        folder.put("_rate.json", text)
        assert Rate.read(folder) is None


def test_listing_opens_no_file_and_planning_opens_each_once(raw, monkeypatch):
    opened: Counter[str] = Counter()
    for name in ("read", "read_ends"):
        real = getattr(Folder, name)

        def counted(self, relative, *args, real=real):
            opened[relative] += 1
            return real(self, relative, *args)

        monkeypatch.setattr(Folder, name, counted)
    sequences = discover(open_folder(str(raw)))
    assert [len(sequence.frames) for sequence in sequences] == [7, 7] and not opened
    plan = make_plan(open_folder(str(raw)), OPTIONS, {})
    assert len(plan.jobs) == 6 and max(opened.values()) == 1
    # All JPGs for their tags; of the RAWs those that are a pair's input.
    assert Counter(name.partition("/")[2][:5] for name in opened if name.startswith("00001/")) == Counter(
        {f"{n:05d}": 2 if n > 4 else 1 for n in range(1, 8)}
    )


def test_a_jpgs_size_comes_with_its_tags():
    data = jpg_bytes(np.zeros((24, 40, 3), np.uint8), 35.0)
    exif = read_exif(data)
    assert exif.size == (24, 40) and exif.focal_mm == 35 and math.prod(exif.size) == 960
    assert read_exif(data[:100]).size is None and read_exif(b"II*\x00").size is None
