"""The teacher cache: round trips, and who may read and write what."""

import json
import os
import pickle

import pyarrow.parquet as pq
import pytest
import torch
from cached import PROVENANCE, ROWS_PER_SHARD, VOCABULARY, K, assert_holds, contents, row, write
from torch.utils.data import DataLoader

from eakd_kernels.cache import CacheError, Provenance, TeacherCacheReader, TeacherCacheWriter, collate, tokenizer_hash

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


def test_a_reader_keeps_what_it_began_with(tmp_path):
    write(tmp_path, 5)
    reader = TeacherCacheReader(tmp_path)
    write(tmp_path, 9, first=5, resume=True)
    assert len(reader) == 5 and torch.equal(reader[4].ids, row(4)[1])
    assert_holds(tmp_path, 9)


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
        ("lse", torch.tensor([0.0, 1e300], dtype=torch.float64), "infinities, as float32, in 1 of 2"),
        ("logprobs", torch.full((2, K), 1e5), "infinities, as float16, in 8 of 8"),
        ("entropy", torch.tensor([-torch.inf, 0.0]), "infinities, as float32, in 1 of 2"),
        ("input_ids", torch.tensor(1), r"shape \[L\], got \[\]"),
        ("ids", torch.zeros(2, K), "must be integers"),
        ("lse", torch.zeros(2, dtype=torch.int64), "must be floating-point"),
    ],
)
def test_what_does_not_fit_is_not_added(tmp_path, name, tensor, message):
    good = {"ids": torch.zeros(2, K, dtype=torch.int64), "logprobs": torch.zeros(2, K)}
    good["logprobs"][0, 1:] = -torch.inf  # padding
    good |= {"input_ids": torch.tensor([0, 1]), "entropy": torch.zeros(2), "lse": torch.zeros(2)}
    with TeacherCacheWriter(tmp_path, PROVENANCE) as writer:
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            writer.append(**good | {name: tensor})
        writer.append(**good)
    assert len(TeacherCacheReader(tmp_path)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({"k": 0}, {"k": VOCABULARY + 1}, {"k": 1.5}, {"vocab_size": "100"}),
        *({"temperature": 0.0}, {"entropy_temperature": -1.0}),
    ],
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


@pytest.mark.parametrize("rows", [0, 2.5, "2", True])
def test_impossible_shards(tmp_path, rows):
    with pytest.raises(CacheError, match="rows_per_shard must be an int >= 1, got"):
        TeacherCacheWriter(tmp_path, PROVENANCE, rows_per_shard=rows)


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
