"""The teacher cache when things go wrong: damaged and foreign files, writers that are killed, disks that are full."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cached import PROVENANCE, ROWS_PER_SHARD, assert_holds, contents, row, write

from eakd_kernels.cache import CacheError, Provenance, TeacherCacheReader, TeacherCacheWriter

# Damage


def read_all(folder):
    return [tuple(sequence) for sequence in TeacherCacheReader(folder)]


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("left", [0, 3, 0.1, 0.5, 0.99])
def test_truncated_file_is_named(cache, shard, left):
    path = cache / f"shard-{shard:06d}.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: left if left >= 1 else int(left * len(whole))])
    with pytest.raises(CacheError, match=path.name):
        read_all(cache)
    with pytest.raises(CacheError, match=path.name):
        TeacherCacheWriter(cache, PROVENANCE, rows_per_shard=ROWS_PER_SHARD, resume=True)


def test_flipped_bits_are_found_or_harmless(cache):
    """Checksums cover the data; the footer is held together by its own structure."""
    path, generator = cache / "shard-000001.parquet", random.Random(0)
    whole, expected, found = path.read_bytes(), read_all(cache), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            got = read_all(cache)
        except CacheError as error:
            found += path.name in str(error)
        else:
            assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert found > 50


def test_metadata_that_was_tampered_with(cache):
    path = cache / "shard-000000.parquet"
    path.write_bytes(path.read_bytes().replace(b'"teacher": "teacher"', b'"teacher": "teachex"'))
    with pytest.raises(CacheError, match=r"shard-000000.parquet has damaged metadata"):
        read_all(cache)


def test_missing_file_is_named(cache):
    (cache / "shard-000001.parquet").unlink()
    for use in (TeacherCacheReader, lambda path: TeacherCacheWriter(path, PROVENANCE, resume=True)):
        with pytest.raises(CacheError, match=r"shard-000001.parquet is missing"):
            use(cache)


def test_short_file_before_the_last(cache):
    os.replace(cache / "shard-000002.parquet", cache / "shard-000001.parquet")
    write(cache.parent / "other", 9)
    (cache.parent / "other" / "shard-000002.parquet").rename(cache / "shard-000002.parquet")
    with pytest.raises(CacheError, match=r"shard-000001.parquet has 1 rows"):
        read_all(cache)
    with pytest.raises(CacheError, match=r"shard-000001.parquet has 1 rows"):
        TeacherCacheWriter(cache, PROVENANCE, rows_per_shard=ROWS_PER_SHARD, resume=True)


def test_file_of_another_cache_among_ours(cache):
    other = Provenance(**vars(PROVENANCE) | {"teacher": "another"})
    with TeacherCacheWriter(cache.parent / "other", other, rows_per_shard=ROWS_PER_SHARD) as writer:
        for number in range(6):
            writer.append(*row(number))
    (cache.parent / "other" / "shard-000001.parquet").replace(cache / "shard-000001.parquet")
    with pytest.raises(CacheError, match=r"shard-000001.parquet is another cache: teacher is 'another', not 'teacher'"):
        read_all(cache)


def test_foreign_files(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "corpus.parquet")
    with pytest.raises(CacheError, match=r"corpus.parquet is not part of a teacher cache"):
        TeacherCacheWriter(tmp_path, PROVENANCE)
    (tmp_path / "corpus.parquet").rename(tmp_path / "shard-000000.parquet")
    with pytest.raises(CacheError, match=r"shard-000000.parquet was not written by eakd_kernels"):
        TeacherCacheReader(tmp_path)
    (tmp_path / "shard-000000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        TeacherCacheReader(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda header: header | {"format_version": 2}, "format version 2, .*reads up to 1"),
        (lambda header: {"format_version": 1}, "other metadata"),
        (lambda header: {"package_version": "1"}, "other metadata.*format_version"),
        (lambda header: [header], "other metadata"),
        (lambda header: header | {"format_version": "2"}, "other metadata"),
        (lambda header: header | {"rows_per_shard": "some"}, "other metadata.*some"),
        (lambda header: header | {"provenance": header["provenance"] | {"k": 1000}}, "other metadata.*got 1000"),
        (lambda header: header | {"provenance": header["provenance"] | {"k": 5}}, "other columns"),
        (lambda header: header | {"rows_per_shard": 2}, "3 rows"),
    ],
)
def test_metadata_that_does_not_fit(cache, change, message):
    path = cache / "shard-000000.parquet"
    table = pq.read_table(path)
    header = json.dumps(change(json.loads(table.schema.metadata[b"eakd_kernels"])))
    pq.write_table(table.replace_schema_metadata({b"eakd_kernels": header}), path, row_group_size=1)
    with pytest.raises(CacheError, match=f"(?s)shard-000000.parquet .*{message}"):
        read_all(cache)


# Writers that die. They run in processes forked from one that has imported torch already.

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["eakd_kernels.cache", "pytest"])
MANY = 10**6


def report_rows(pipe, folder, rows, flush_every=5):
    """Resumes up to `rows` sequences and sends what is reported as written, before the first and after every one."""
    with TeacherCacheWriter(folder, PROVENANCE, rows_per_shard=ROWS_PER_SHARD, resume=True) as writer:
        pipe.send(writer.rows_written)
        for number in range(writer.rows_written, rows):
            pipe.send(writer.append(*row(number)))
            if number % flush_every == 0:
                pipe.send(writer.flush())


def die_at_step(pipe, folder, rows, step):
    """As above, but the process is gone before the step-th thing that is done to a file."""
    steps = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal steps
            if steps == step:
                os._exit(1)
            steps += 1
            return function(*args, **kwargs)

        return wrapper

    pq.ParquetWriter.write_batch = counted(pq.ParquetWriter.write_batch)
    pq.ParquetWriter.close = counted(pq.ParquetWriter.close)
    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    report_rows(pipe, folder, rows)


def started(target, *arguments):
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


def all_reports(pipe):
    reports = []
    try:
        while True:
            reports.append(pipe.recv())
    except EOFError:
        return reports


def assert_nothing_lost(folder, reported):
    """Returns how many sequences there are."""
    if not list(folder.glob("*.parquet")):
        assert reported == 0
        return 0
    rows = len(TeacherCacheReader(folder))
    assert rows >= reported
    assert_holds(folder, rows)
    return rows


def test_killed_at_random_moments(tmp_path):
    generator, folder, rows = random.Random(0), tmp_path / "killed", 0
    folder.mkdir()
    for _ in range(20):
        process, pipe = started(report_rows, folder, MANY)
        resumed_at = reported = pipe.recv()
        assert resumed_at == rows
        for _ in range(generator.randrange(25)):
            reported = pipe.recv()
        if generator.random() < 0.5:
            process.join(generator.uniform(0, 0.005))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reported = max([reported, *all_reports(pipe)])
        rows = assert_nothing_lost(folder, reported)
    write(folder, rows + 5, first=rows, resume=True)
    write(tmp_path / "whole", rows + 5)
    assert contents(folder) == contents(tmp_path / "whole")
    assert rows > 40, "the writers were killed too early to show anything"


def test_dying_at_every_step(tmp_path):
    write(tmp_path / "whole", 7)
    exitcode, step = 1, 0
    while exitcode == 1:
        folder = tmp_path / str(step)
        folder.mkdir()
        process, pipe = started(die_at_step, folder, 7, step)
        reports = all_reports(pipe)
        process.join()
        exitcode = process.exitcode
        rows = assert_nothing_lost(folder, max(reports))
        write(folder, 7, first=rows, resume=True)
        assert contents(folder) == contents(tmp_path / "whole"), step
        step += 1
    assert exitcode == 0 and step > 20


def test_synced_before_renamed_before_reported(tmp_path, monkeypatch):
    """What a kill cannot show and a power failure would."""
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", path.name, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def note_replace(source, target):
        done.append(("rename", Path(source).name, Path(target).name))
        replace(source, target)

    writer = TeacherCacheWriter(tmp_path / "cache", PROVENANCE, rows_per_shard=1)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    assert writer.append(*row(1)) == 1
    writer.close()
    name = "shard-000000.parquet"
    size = (tmp_path / "cache" / name).stat().st_size
    assert done == [("sync", f".{name}.tmp", size), ("rename", f".{name}.tmp", name), ("sync", "cache", None)]


def test_what_a_dead_writer_left_is_removed(cache):
    for name in (".shard-000002.parquet.tmp", ".shard-000003.parquet.tmp", ".mine.tmp"):
        (cache / name).write_bytes(b"PAR1")
    write(cache, 7, first=7, resume=True)
    assert sorted(contents(cache)) == [".mine.tmp", *(f"shard-{number:06d}.parquet" for number in range(3))]


def test_an_exception_writes_no_more_than_a_kill_would(tmp_path):
    with pytest.raises(KeyboardInterrupt), TeacherCacheWriter(tmp_path, PROVENANCE, rows_per_shard=3) as writer:
        for number in range(5):
            writer.append(*row(number))
        raise KeyboardInterrupt
    assert_holds(tmp_path, 3)
    write(tmp_path, 7, first=3, resume=True)
    assert_holds(tmp_path, 7)


def test_a_full_disk_is_like_a_kill(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = TeacherCacheWriter(tmp_path, PROVENANCE, rows_per_shard=ROWS_PER_SHARD)
    for number in range(5):
        writer.append(*row(number))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        writer.append(*row(5))
    assert writer.rows_written == 3
    with pytest.raises(ValueError, match="closed"):
        writer.append(*row(5))
    assert_holds(tmp_path, 3)
    write(tmp_path, 7, first=3, resume=True)
    assert_holds(tmp_path, 7)
