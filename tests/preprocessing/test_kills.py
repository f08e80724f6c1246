"""After kills, full disks or concurrent runs, one more run gives the same SHARDS as an undisturbed run."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_decoder import fake_decoder_path, mark_file
from known_scene import write_sequence

from preprocessing import shards
from preprocessing.pairs import process
from preprocessing.schema import list_shards
from preprocessing.shards import PreprocessOptions, preprocess
from preprocessing.storage import Folder, writer_id


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, except _rate.json, which holds the time taken."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "_rate.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


# A run without Ray is killed before and after each change to SHARDS.


@pytest.fixture
def changed(tmp_path):
    """(RAW, SHARDS) with every kind of work to do.

    One sequence each is new, changed, damaged, repaired, excluded, moved to val, or has a better LR frame.
    """
    raw, out = tmp_path / "raw", tmp_path / "shards"
    write_sequence(raw / "00001", seed=1, size=SIZE, focals_mm=(240, 150, 50, 35))
    for number in range(2, 8):
        shutil.copytree(raw / "00001", raw / f"{number:05d}")
    new = raw / "00003"
    new.rename(tmp_path / "00003")
    repaired = (raw / "00005" / "00003.dng").read_bytes()
    damage(raw / "00005" / "00003.dng")
    closer = (raw / "00007" / "00003.dng").read_bytes(), (raw / "00007" / "00003.JPG").read_bytes()
    write_sequence(tmp_path / "other", seed=1, size=SIZE, focals_mm=(240, 150, 47, 35))
    for suffix in ("dng", "JPG"):
        shutil.copy(tmp_path / "other" / f"00003.{suffix}", raw / "00007" / f"00009.{suffix}")
        (raw / "00007" / f"00003.{suffix}").unlink()
    in_process(raw, out, PreprocessOptions(tile_px=12, stride_px=12))
    (tmp_path / "00003").rename(new)
    (raw / "00005" / "00003.dng").write_bytes(repaired)
    damage(raw / "00004" / "00003.dng")
    (raw / "00001" / "00001.JPG").write_bytes((raw / "00001" / "00001.JPG").read_bytes() + b"\0")
    for suffix, data in zip(("dng", "JPG"), closer, strict=True):
        (raw / "00007" / f"00003.{suffix}").write_bytes(data)
    return raw, out


SIZE = (128, 192)
NOW = PreprocessOptions(tile_px=12, stride_px=12, val=("00002",), exclude=("00006",))


def in_process(raw, out, options=NOW, die_at=None):
    """Run without Ray in a forked process that kills itself at moment `die_at`. Returns whether it finished."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            shards.run_tasks = lambda todo, task: (process(job, **task.keywords) for job in todo)
            _kill_self_at(die_at)
            preprocess(str(raw), str(out), options, progress=False, start_ray=lambda: None)
            code = 0
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def _kill_self_at(moment):
    """Make this process kill itself at the `moment`-th point just before, during or after a change to SHARDS."""
    passed = 0

    def tick():
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name):
        real = getattr(Folder, name)

        def deed(self, *arguments):
            tick()
            if name == "put":
                half = self.path(f"{arguments[0].rpartition('/')[0]}/.half~{writer_id()}".lstrip("/"))
                Path(half).parent.mkdir(parents=True, exist_ok=True)
                Path(half).write_bytes(bytes(arguments[1])[:100])
                tick()
                Path(half).unlink()
            if name == "move":  # on S3 a copy, then a deletion
                self.filesystem.create_dir(self.path(arguments[1]).rpartition("/")[0])
                shutil.copy(*map(self.path, arguments))
                tick()
            real(self, *arguments)
            tick()

        setattr(Folder, name, deed)

    for name in ("put", "move", "delete"):
        around(name)


def test_restart_after_a_kill_at_each_moment(changed, tmp_path):
    raw, out = changed
    shutil.copytree(out, tmp_path / "undisturbed")
    assert in_process(raw, tmp_path / "undisturbed")
    expected = content(tmp_path / "undisturbed")
    assert in_process(raw, tmp_path / "fresh")
    fresh = content(tmp_path / "fresh")
    assert {k: v for k, v in fresh.items() if k != "_dataset.json"} == {
        k: v for k, v in expected.items() if k != "_dataset.json"
    }
    moment, ended = 0, False
    while not ended:
        moment += 1
        copy = tmp_path / "killed"
        shutil.copytree(out, copy)
        ended = in_process(raw, copy, die_at=moment)
        for path in list_shards(str(copy)):
            pq.read_metadata(path)  # raises unless the file is complete
        assert in_process(raw, copy)
        assert content(copy) == expected, moment
        shutil.rmtree(copy)
    assert moment > 30


# Runs of the command line.

SEQUENCES = 8


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Eight sequences, two of them with a half-written RAW."""
    raw = tmp_path_factory.mktemp("kills") / "raw"
    write_sequence(raw / "00001", seed=1)
    for number in range(2, SEQUENCES + 1):
        shutil.copytree(raw / "00001", raw / f"{number:05d}")
    for number in (3, 6):
        damage(raw / f"{number:05d}" / "00005.dng")
    return raw


@pytest.fixture(scope="module")
def undisturbed(raw):
    out = raw.parent / "undisturbed"
    assert start(raw, out).wait() == 0
    found = content(out)
    assert sum(name.endswith(".parquet") for name in found) == 3 * SEQUENCES - 2
    return found


def start(raw, out, **streams):
    command = [str(Path(sys.executable).with_name("sdan")), "--data", str(raw.parent / "data"), "preprocess"]
    command += [str(raw), str(out), "--tile", "24", "--stride", "16", "--val", "00002"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, text=True, **(quiet | streams))


def wait_for(driver, least, out):
    while driver.poll() is None and len(list_shards(str(out))) < least:
        time.sleep(0.005)


@pytest.mark.slow
def test_restart_after_random_kills_of_the_driver(raw, undisturbed, tmp_path):
    rng, out = random.Random(1), tmp_path / "shards"
    for least in (0, rng.randrange(1, 6), rng.randrange(6, 20)):
        driver = start(raw, out)
        wait_for(driver, least, out)
        time.sleep(rng.random() * rng.choice([0.05, 0.5, 5]))
        driver.kill()
        driver.wait()
        for path in list_shards(str(out)):
            pq.read_table(path)  # raises unless the file is complete
    last = start(raw, out, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said, _ = last.communicate()
    assert last.returncode == 0 and content(out) == undisturbed
    assert said.count("set aside: 00003 00005-00001") == said.count("set aside: 00006 00005-00001") == 1


@pytest.mark.slow
def test_restart_after_random_kills_of_workers(raw, undisturbed, tmp_path):
    rng, out = random.Random(1), tmp_path / "shards"
    driver = start(raw, out)
    wait_for(driver, 1, out)
    for _ in range(8):
        workers = [pid for pid in descendants(driver.pid) if is_worker(pid)]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
        time.sleep(rng.random())
    assert driver.wait() == 0
    assert content(out).keys() <= undisturbed.keys() | {f"_quarantine/{name}.json" for name in keys_of(undisturbed)}
    assert start(raw, out).wait() == 0 and content(out) == undisturbed


def keys_of(files):
    return {Path(name).name.rpartition("_")[0] for name in files if name.endswith(".parquet")}


def descendants(pid):
    found = []
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def is_worker(pid):
    """Whether this is a Ray worker or an isolated child process."""
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return any(
            name in command for name in (b"ray::_map_task", b"ray::IDLE", b"ray::Map", b"preprocessing.isolation")
        )
    return False


@pytest.mark.slow
def test_pairs_that_crash_the_decoder_are_set_aside(raw, undisturbed, tmp_path):
    bad, out = tmp_path / "raw", tmp_path / "shards"
    shutil.copytree(raw, bad)
    good = (bad / "00004" / "00006.dng").read_bytes()
    mark_file(bad / "00004" / "00006.dng", "SIGSEGV")
    mark_file(bad / "00005" / "00006.dng", "SIGKILL")
    environment = os.environ | {"PYTHONPATH": fake_decoder_path(tmp_path)}
    for expected in ("24 pairs: 20 written", "24 pairs: 0 written"):
        run = start(bad, out, stdout=subprocess.PIPE, env=environment)
        said, _ = run.communicate()
        assert run.returncode == 0 and expected in said, said
        assert "set aside: 00004 00006-00002: 00004/00006.dng: the decoder crashed" in said and "SIGSEGV" in said
        assert "set aside: 00005 00006-00002: 00005/00006.dng: its process died in 3 attempts (killed, SIGKILL)" in said
    for number in (4, 5):
        (bad / f"{number:05d}" / "00006.dng").write_bytes(good)
    assert start(bad, out).wait() == 0 and content(out) == undisturbed


@pytest.mark.slow
def test_two_concurrent_runs_write_what_one_would(raw, undisturbed, tmp_path):
    both = [start(raw, tmp_path / "shards") for _ in range(2)]
    assert [run.wait() for run in both] == [0, 0]
    assert start(raw, tmp_path / "shards").wait() == 0 and content(tmp_path / "shards") == undisturbed


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_finished_pairs(raw, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (raw.parent / "undisturbed").rglob("*.parquet"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        full = start(raw, disk / "shards", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, said = full.communicate()
        assert full.returncode == 2
        last = said.strip().splitlines()[-1]
        assert (
            last.startswith(f"sdan: {disk / 'shards'}: expected a folder that can be written, got ")
            and "No space left" in last
        ), said
        finished = content(disk / "shards")
        assert finished.items() <= undisturbed.items() and len(finished) > 3
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        assert start(raw, disk / "shards").wait() == 0 and content(disk / "shards") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)
