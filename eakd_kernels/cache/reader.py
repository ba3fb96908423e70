"""Reading a cache: sequences as tensors, and batches of them."""

import operator
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .format import CacheError, Shard, open_shard, shard_paths, tokenizer_hash

# An open shard keeps a file descriptor; processes have 1024 by default.
_MOST_OPEN_SHARDS = 64


class CachedSequence(NamedTuple):
    """L tokens and what the teacher expects after each of them: position j is about token j + 1."""

    input_ids: Tensor  # [L] int64
    ids: Tensor  # [L, k] int64: the teacher's likeliest tokens, likeliest first
    logprobs: Tensor  # [L, k] fp32: their log-probabilities, in nats, at `temperature`; exact to fp16
    entropy: Tensor  # [L] fp32: nats, of the whole distribution at `entropy_temperature`
    lse: Tensor  # [L] fp32: logsumexp(logits / temperature)


class CachedBatch(NamedTuple):
    """B sequences, padded at their ends to the longest, L. Padding reads 0 but in labels."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] bool: True = a token
    labels: Tensor  # [B, L] int64: the token after each, -100 where there is none
    ids: Tensor  # [B, L, k] int64
    logprobs: Tensor  # [B, L, k] fp32
    entropy: Tensor  # [B, L] fp32
    lse: Tensor  # [B, L] fp32


class TeacherCacheReader(Dataset):
    """The cache in folder `path`, a map-style Dataset of `CachedSequence`, for DataLoaders with or without workers.

    Files are mapped into memory, opened when first read from, and every page's checksum is verified. While a writer is
    at work, a reader sees the sequences that were durable when it was made.

    Args:
        path: the folder.
        tokenizer: the student's, or its `tokenizer_hash`; refused unless it is the teacher's.
        vocab_size: columns of the student's logits that the loss will use; refused unless the teacher has as many.

    `provenance` says where the numbers come from.

    Raises:
        FileNotFoundError: there is no cache.
        CacheError (a ValueError): tokenizer or vocab_size differ; a file is missing, truncated, damaged or foreign.
            Damage within a file shows when it is read from."""

    def __init__(self, path: str | os.PathLike, *, tokenizer=None, vocab_size: int | None = None):
        self.path = Path(path)
        self._paths = shard_paths(self.path)
        if not self._paths:
            raise FileNotFoundError(f"{self.path} has no teacher cache: there is no shard-000000.parquet")
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        first = open_shard(self._paths[0])
        self.provenance, self.rows_per_shard = first.provenance, first.rows_per_shard
        self._check_vocabulary(tokenizer, vocab_size)
        last = len(self._paths) - 1
        self._length = last * self.rows_per_shard + open_shard(self._paths[last]).rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> CachedSequence:
        """Raises IndexError out of range, CacheError for a damaged file."""
        index = operator.index(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"{self.path} has {self._length} sequences, got index {index}")
        shard, row = divmod(index % self._length, self.rows_per_shard)
        columns = self._shard(shard).read(row).columns
        return CachedSequence(*(_tensor(column.values, self.provenance.k) for column in columns))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": OrderedDict()}  # a worker opens its own

    def _check_vocabulary(self, tokenizer, vocab_size: int | None) -> None:
        if tokenizer is not None:
            given = tokenizer if isinstance(tokenizer, str) else tokenizer_hash(tokenizer)
            if given != self.provenance.tokenizer:
                raise CacheError(
                    f"{self.path} was written with another tokenizer (hash {self.provenance.tokenizer}, teacher "
                    f"{self.provenance.teacher!r}); the one given has hash {given}"
                )
        if vocab_size is not None and vocab_size != self.provenance.vocab_size:
            raise CacheError(f"{self.path} has vocab_size={self.provenance.vocab_size}, not {vocab_size}")

    def _shard(self, number: int) -> Shard:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = open_shard(self._paths[number])
        self.provenance.require(shard.provenance, shard.path)
        expected = min(self.rows_per_shard, self._length - number * self.rows_per_shard)
        if shard.rows < expected or shard.rows_per_shard != self.rows_per_shard:
            raise CacheError(f"{shard.path} has {shard.rows} rows, of {expected} it must have")
        self._shards[number] = shard
        if len(self._shards) > _MOST_OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard


def collate(sequences: Sequence[CachedSequence], pad_token_id: int = 0) -> CachedBatch:
    """B sequences as a batch: `DataLoader(reader, batch_size=B, shuffle=True, collate_fn=collate)`.

    pad_token_id: what input_ids read behind a sequence's end."""
    padded = {name: _padded([getattr(s, name) for s in sequences]) for name in ("ids", "logprobs", "entropy", "lse")}
    input_ids = _padded([s.input_ids for s in sequences], pad_token_id)
    length = torch.tensor([len(s.input_ids) for s in sequences])
    labels = _padded([s.input_ids[1:] for s in sequences], -100)
    missing = input_ids.shape[1] - labels.shape[1]
    return CachedBatch(
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < length[:, None],
        labels=torch.nn.functional.pad(labels, (0, missing), value=-100),
        **padded,
    )


def _padded(tensors: list[Tensor], value: float = 0) -> Tensor:
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _tensor(tokens: pa.Array, k: int) -> Tensor:
    """[L] or [L, k]; a copy, since what Arrow has mapped must not be written to."""
    if pa.types.is_fixed_size_list(tokens.type):
        values = tokens.flatten().to_numpy().reshape(-1, k)
    else:
        values = tokens.to_numpy()
    return torch.from_numpy(values.astype(np.int64 if values.dtype.kind == "i" else np.float32))
