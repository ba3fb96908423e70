"""The teacher cache: round trips, killed writers, damaged files."""

import json
import multiprocessing
import os
import pickle
import random
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from eakd_kernels.cache import CacheError, Provenance, TeacherCacheReader, TeacherCacheWriter, collate, tokenizer_hash
from eakd_kernels.cache import writer as writer_module

VOCABULARY, K, ROWS_PER_SHARD = 100, 4, 3
PROVENANCE = Provenance("teacher", "0123", VOCABULARY, K, 2.0, 1.0, {"corpus": "made up"})


def row(number):
    """A sequence that its number decides, of 0 to 6 tokens: input_ids, ids, logprobs, entropy, lse."""
    generator = torch.Generator().manual_seed(number)
    length = 7 * number % 11 % 7
    logits = 5 * torch.randn(length, VOCABULARY, generator=generator)
    logprobs, ids = logits.log_softmax(-1).topk(K)
    entropy = torch.distributions.Categorical(logits=logits).entropy() if length else torch.zeros(0)
    return torch.randint(VOCABULARY, (length,), generator=generator), ids, logprobs, entropy, logits.logsumexp(-1)


def write(folder, rows, first=0, **options):
    with TeacherCacheWriter(folder, PROVENANCE, **{"rows_per_shard": ROWS_PER_SHARD} | options) as writer:
        for number in range(first, rows):
            writer.append(*row(number))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def assert_holds(folder, rows):
    reader = TeacherCacheReader(folder)
    assert len(reader) == rows
    for number, found in enumerate(reader):
        input_ids, ids, logprobs, entropy, lse = row(number)
        for got, expected in zip(found, (input_ids, ids, logprobs.half().float(), entropy, lse), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected), number


@pytest.fixture
def cache(tmp_path):
    """Seven sequences in three files."""
    write(tmp_path / "cache", 7)
    return tmp_path / "cache"


# Reading


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7])
def test_round_trip(tmp_path, rows):
    write(tmp_path / "a" / "b", rows)
    assert_holds(tmp_path / "a" / "b", rows)
    assert len(contents(tmp_path / "a" / "b")) == -(-rows // ROWS_PER_SHARD)


def test_indices(cache):
    reader = TeacherCacheReader(cache)
    assert torch.equal(reader[-1].ids, row(6)[1]) and torch.equal(reader[torch.tensor(5)].ids, row(5)[1])
    for index in (7, -8):
        with pytest.raises(IndexError, match="7 sequences"):
            reader[index]
    with pytest.raises(TypeError):
        reader["0"]


def test_provenance_is_kept(cache):
    assert TeacherCacheReader(cache).provenance == PROVENANCE
    header = json.loads(pq.read_schema(cache / "shard-000000.parquet").metadata[b"eakd_kernels"])
    assert header["provenance"]["teacher"] == "teacher" and header["format_version"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(cache, workers):
    reader = TeacherCacheReader(cache)
    reader[0]  # opened before workers are forked
    batches = list(DataLoader(reader, batch_size=3, collate_fn=collate, num_workers=workers))
    assert [len(batch.input_ids) for batch in batches] == [3, 3, 1]
    for number in range(7):
        batch, (input_ids, ids, logprobs, entropy, lse) = batches[number // 3], row(number)
        mine, length = number % 3, len(input_ids)
        assert batch.attention_mask[mine].sum() == length and batch.attention_mask[mine, :length].all()
        assert batch.labels[mine, : length - 1 if length else 0].tolist() == input_ids[1:].tolist()
        assert (batch.labels[mine, max(length - 1, 0) :] == -100).all()
        expected = (input_ids, ids, logprobs.half().float(), entropy, lse)
        for name, tensor in zip(("input_ids", "ids", "logprobs", "entropy", "lse"), expected, strict=True):
            padded = getattr(batch, name)[mine]
            assert torch.equal(padded[:length], tensor) and (padded[length:] == 0).all(), name


def test_collate_pads_with_what_it_is_told(cache):
    reader = TeacherCacheReader(cache)
    batch = collate([reader[0], reader[1]], pad_token_id=7)
    assert len(reader[0].input_ids) == 0 and (batch.input_ids[0] == 7).all()


def test_pickled_reader_opens_its_own_files(cache):
    reader = TeacherCacheReader(cache)
    assert torch.equal(reader[5].ids, pickle.loads(pickle.dumps(reader))[5].ids)


def test_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("eakd_kernels.cache.reader._MOST_OPEN_SHARDS", 2)
    write(tmp_path, 7, rows_per_shard=1)
    assert_holds(tmp_path, 7)


def test_datasets_reads_it(cache, tmp_path):
    import datasets

    files = str(cache / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "hf"), split="train")
    assert table.column_names == ["input_ids", "ids", "logprobs", "entropy", "lse"] and len(table) == 7
    for number, found in enumerate(table):
        input_ids, ids, logprobs, entropy, lse = row(number)
        expected = (input_ids, ids, logprobs.half().float(), entropy, lse)
        for got, tensor in zip(found.values(), expected, strict=True):
            assert torch.equal(torch.tensor(got, dtype=tensor.dtype).reshape(tensor.shape), tensor)


def test_half_precision_is_enough(tmp_path):
    """Half a unit in the last of 11 bits: 2^-11 of a nat at 1, 1/128 at 16. Below fp16's range nothing is left of p."""
    logprobs = -torch.logspace(-8, 5, 400).view(100, K)
    ids, rest = torch.zeros(100, K, dtype=torch.int64), torch.zeros(100)
    with TeacherCacheWriter(tmp_path, PROVENANCE) as writer:
        writer.append(ids[:, 0], ids, logprobs, rest, rest)
    read = TeacherCacheReader(tmp_path)[0].logprobs
    small = logprobs >= -65504
    assert ((read - logprobs).abs()[small] <= logprobs.abs()[small] * 2**-11 + 2**-25).all()
    assert (read[~small] <= -65504).all()


# Who may write what


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("input_ids", torch.tensor([1, VOCABULARY]), r"vocab_size=100\), got 1 to 100"),
        ("ids", torch.full((2, K), -1), "got -1 to -1"),
        ("ids", torch.zeros(2, K + 1, dtype=torch.int64), r"shape \[2, 4\], got \[2, 5\]"),
        ("logprobs", torch.zeros(3, K), r"shape \[2, 4\], got \[3, 4\]"),
        ("logprobs", torch.full((2, K), float("nan")), "NaN in 8 of 8"),
        ("entropy", torch.zeros(2, 1), r"shape \[2\], got \[2, 1\]"),
        ("lse", torch.tensor([0.0, float("nan")]), "NaN in 1 of 2"),
        ("ids", torch.zeros(2, K), "must be integers"),
        ("lse", torch.zeros(2, dtype=torch.int64), "must be floating-point"),
    ],
)
def test_what_does_not_fit_is_not_added(tmp_path, name, tensor, message):
    good = {"ids": torch.zeros(2, K, dtype=torch.int64), "logprobs": torch.zeros(2, K)}
    good |= {"input_ids": torch.tensor([0, 1]), "entropy": torch.zeros(2), "lse": torch.zeros(2)}
    with TeacherCacheWriter(tmp_path, PROVENANCE) as writer:
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            writer.append(**good | {name: tensor})
        writer.append(**good)
    assert len(TeacherCacheReader(tmp_path)) == 1


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"k": VOCABULARY + 1}, {"temperature": 0.0}, {"entropy_temperature": -1.0}]
)
def test_impossible_provenance(wrong):
    with pytest.raises(CacheError, match=next(iter(wrong))):
        Provenance(**vars(PROVENANCE) | wrong)


@pytest.mark.parametrize(
    "changed",
    [
        {"teacher": "another"},
        {"tokenizer": "4567"},
        {"vocab_size": 128},
        {"temperature": 1.0},
        {"entropy_temperature": 3.0},
        {"settings": {"corpus": "another"}},
        {"settings": {}},
        {"k": 5, "teacher": "another"},
    ],
)
def test_resuming_another_cache_says_what_differs(cache, changed):
    before = contents(cache)
    with pytest.raises(CacheError) as error:
        TeacherCacheWriter(cache, Provenance(**vars(PROVENANCE) | changed), rows_per_shard=ROWS_PER_SHARD, resume=True)
    assert all(name in str(error.value) for name in changed) and str(cache) in str(error.value)
    assert contents(cache) == before


def test_resuming_with_other_shards(cache):
    with pytest.raises(CacheError, match="rows_per_shard=3, not 5"):
        TeacherCacheWriter(cache, PROVENANCE, rows_per_shard=5, resume=True)


def test_a_cache_is_not_overwritten(cache):
    with pytest.raises(FileExistsError, match="resume=True"):
        TeacherCacheWriter(cache, PROVENANCE, rows_per_shard=ROWS_PER_SHARD)
    assert_holds(cache, 7)


def test_one_writer_at_a_time(cache):
    options = {"rows_per_shard": ROWS_PER_SHARD, "resume": True}
    with TeacherCacheWriter(cache, PROVENANCE, **options):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
            TeacherCacheWriter(cache, PROVENANCE, **options)
        assert_holds(cache, 7)  # readers are welcome
    TeacherCacheWriter(cache, PROVENANCE, **options).close()


def test_closed_writer(tmp_path):
    writer = TeacherCacheWriter(tmp_path, PROVENANCE)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(*row(1))


class Tokenizer:
    def __init__(self, vocabulary, special=()):
        self.vocabulary, self.all_special_ids = vocabulary, special

    def get_vocab(self):
        return self.vocabulary


def test_tokenizer_hash():
    tokens = {"a": 0, "b": 1}
    known = tokenizer_hash(Tokenizer(tokens, [1]))
    assert known == tokenizer_hash(Tokenizer({"b": 1, "a": 0}, [1, 1]))
    others = [Tokenizer(tokens), Tokenizer({"a": 1, "b": 0}, [1]), Tokenizer(tokens | {"c": 2}, [1])]
    assert known not in map(tokenizer_hash, others)


def test_reader_refuses_another_vocabulary(tmp_path):
    tokenizer = Tokenizer({"a": 0})
    provenance = Provenance(**vars(PROVENANCE) | {"tokenizer": tokenizer_hash(tokenizer)})
    with TeacherCacheWriter(tmp_path, provenance) as writer:
        writer.append(*row(1))
    for given in (tokenizer, tokenizer_hash(tokenizer)):
        TeacherCacheReader(tmp_path, tokenizer=given, vocab_size=VOCABULARY)
    with pytest.raises(CacheError, match="another tokenizer"):
        TeacherCacheReader(tmp_path, tokenizer=Tokenizer({"b": 0}))
    with pytest.raises(CacheError, match="vocab_size=100, not 128"):
        TeacherCacheReader(tmp_path, vocab_size=128)


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
    generator, folder, rows, midway = random.Random(0), tmp_path / "killed", 0, 0
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
        midway += any(folder.glob(".*.tmp"))
        rows = assert_nothing_lost(folder, reported)
    write(folder, rows + 5, first=rows, resume=True)
    write(tmp_path / "whole", rows + 5)
    assert contents(folder) == contents(tmp_path / "whole")
    assert rows > 40 and midway > 0, "the writers were killed too early to show anything"


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


def test_an_exception_writes_no_more_than_a_kill_would(tmp_path):
    with pytest.raises(KeyboardInterrupt), TeacherCacheWriter(tmp_path, PROVENANCE, rows_per_shard=3) as writer:
        for number in range(5):
            writer.append(*row(number))
        raise KeyboardInterrupt
    assert_holds(tmp_path, 3)
    write(tmp_path, 7, first=3, resume=True)
    assert_holds(tmp_path, 7)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The sequences are kept, and the next flush writes them."""

    def full(*_):
        raise OSError(28, "No space left on device")

    writer = TeacherCacheWriter(tmp_path, PROVENANCE, rows_per_shard=3)
    for number in range(4):
        writer.append(*row(number))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(writer_module.os, "fsync", full)
        writer.flush()
    assert writer.rows_written == 3
    assert_holds(tmp_path, 3)
    writer.close()
    assert_holds(tmp_path, 4)
    assert set(contents(tmp_path)) == {"shard-000000.parquet", "shard-000001.parquet"}
