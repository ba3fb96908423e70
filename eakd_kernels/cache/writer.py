"""Writing a cache so that a killed process loses nothing it reported as written."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .format import CacheError, Provenance, open_shard, schema, shard_path, shard_paths

_LOCK_NAME = ".lock"
_TEMPORARY_SUFFIX = ".tmp"
# Bytes of the same rank next to each other: the upper ones of token ids and log-probabilities repeat, and zstd sees it.
_SPLIT_COLUMNS = ("input_ids.list.element", "ids.list.element.list.element", "logprobs.list.element.list.element")


class TeacherCacheWriter:
    """Appends sequences to the cache in folder `path`, which is made if it is not there.

    Sequences are collected in memory and become durable a shard (a file of rows_per_shard sequences) at a time: written
    under a temporary name, synced to disk, renamed, and the folder synced. `rows_written` counts the durable ones. A
    killed process takes none of them away, and `resume=True` goes on behind them. What a file holds, to the byte,
    depends on the sequences alone and not on interruptions or `flush`.

        with TeacherCacheWriter("cache", provenance, resume=True) as writer:
            for tokens in sequences[writer.rows_written:]:
                writer.append(tokens, *teacher_topk(logits_of(tokens), provenance.k, temperature=..., ...))

    Args:
        path: the folder.
        provenance: goes into every file; when resuming, it must be the one found there.
        rows_per_shard: sequences a file; a shard takes rows_per_shard * L * (6 k + 12) bytes of memory at L tokens
            each.
        resume: whether to go on with the cache that is there. Without one, either starts at 0.

    Leaving the `with` block writes what is left; leaving it by an exception does not, as if the process were killed.
    Where writing fails (a full disk), the writer is closed with what is durable; resuming goes on.

    Raises:
        FileExistsError: there is a cache, and resume is False.
        BlockingIOError: another writer, in this process or another, has the folder.
        CacheError (a ValueError): resuming with another provenance or rows_per_shard (it names what differs), or a file
            is missing, truncated or foreign (it names the file)."""

    def __init__(
        self, path: str | os.PathLike, provenance: Provenance, *, rows_per_shard: int = 256, resume: bool = False
    ):
        if type(rows_per_shard) is not int or rows_per_shard < 1:
            raise CacheError(f"rows_per_shard must be an int >= 1, got {rows_per_shard!r}")
        self.path, self.provenance, self.rows_per_shard = Path(path), provenance, rows_per_shard
        self._schema = schema(provenance, rows_per_shard)
        self._full_shards = 0
        self._open: list[pa.RecordBatch] = []  # the sequences of the shard that is not full yet
        self._durable = 0  # how many of them are on disk
        _make_folder(self.path)
        self._lock: IO | None = _lock(self.path)
        try:
            self._find_what_is_there(resume)
        except BaseException:
            self._release()
            raise

    @property
    def rows_written(self) -> int:
        """Sequences that are durable: reading finds them, and a resumed writer goes on behind them."""
        return self._full_shards * self.rows_per_shard + self._durable

    def append(self, input_ids: Tensor, ids: Tensor, logprobs: Tensor, entropy: Tensor, lse: Tensor) -> int:
        """Adds a sequence of L >= 0 tokens; tensors on any device. Returns `rows_written`.

        Args:
            input_ids: [L], integers below vocab_size.
            ids, logprobs: [L, k], the teacher's likeliest tokens after each and their log-probabilities in nats at
                `temperature`, stored in fp16; -inf is padding.
            entropy: [L], nats, of the whole distribution at `entropy_temperature`; stored in fp32.
            lse: [L], logsumexp(logits / temperature); stored in fp32.

        Raises ValueError naming the argument whose shape or values do not fit; the sequence is then not added."""
        self._check_open()
        row = self._as_row(input_ids=input_ids, ids=ids, logprobs=logprobs, entropy=entropy, lse=lse)
        self._open.append(row)
        if len(self._open) == self.rows_per_shard:
            self.flush()
        return self.rows_written

    def flush(self) -> int:
        """Makes every sequence durable and returns `rows_written`. A shard begun is replaced by a longer one later."""
        self._check_open()
        if len(self._open) > self._durable:
            path = shard_path(self.path, self._full_shards)
            try:
                _replace_durably(path, lambda file: _write_shard(file, self._schema, self._open))
            except BaseException:
                self._release()
                raise
            self._durable = len(self._open)
        if self._durable == self.rows_per_shard:
            self._full_shards, self._durable, self._open = self._full_shards + 1, 0, []
        return self.rows_written

    def close(self) -> None:
        """Flushes, and lets others write. Closing again does nothing."""
        if self._lock is not None:
            try:
                self.flush()
            finally:
                self._release()

    def __enter__(self) -> "TeacherCacheWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def _check_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"the writer of {self.path} is closed")

    def _find_what_is_there(self, resume: bool) -> None:
        shards = shard_paths(self.path)
        if shards and not resume:
            raise FileExistsError(f"{self.path} has a teacher cache; resume=True (--resume) goes on with it")
        for leftover in self.path.glob(f".shard-*{_TEMPORARY_SUFFIX}"):
            leftover.unlink()
        for number, path in enumerate(shards):
            shard = open_shard(path)
            self.provenance.require(shard.provenance, path)
            if shard.rows_per_shard != self.rows_per_shard:
                raise CacheError(f"{path} has rows_per_shard={shard.rows_per_shard}, not {self.rows_per_shard}")
            if shard.rows == self.rows_per_shard:
                self._full_shards += 1
            elif number == len(shards) - 1:
                self._open = [shard.read(row) for row in range(shard.rows)]
                self._durable = shard.rows
            else:
                raise CacheError(f"{path} has {shard.rows} rows, of {self.rows_per_shard} it must have before the last")

    def _as_row(self, **tensors: Tensor) -> pa.RecordBatch:
        if tensors["input_ids"].dim() != 1:
            raise ValueError(f"input_ids must have shape [L], got {list(tensors['input_ids'].shape)}")
        length, k = len(tensors["input_ids"]), self.provenance.k
        for name, tensor in tensors.items():
            shape = (length, k) if name in ("ids", "logprobs") else (length,)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.is_floating_point() == (name in ("input_ids", "ids")):
                kind = "integers" if tensor.is_floating_point() else "floating-point numbers"
                raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")
        arrays = {name: _numpy(tensors[name], field.type) for name, field in zip(tensors, self._schema, strict=True)}
        self._check_values(arrays)
        return pa.RecordBatch.from_arrays(
            [_one_list(arrays[field.name], field.type) for field in self._schema], schema=self._schema
        )

    def _check_values(self, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                wrong = ~np.isfinite(array)
                if name == "logprobs":
                    wrong &= array != -np.inf
                if wrong.any():
                    found = "NaN" if np.isnan(array).any() else f"infinities, as {array.dtype},"
                    raise ValueError(f"{name} has {found} in {int(wrong.sum())} of {array.size} places")
            size = self.provenance.vocab_size
            if array.dtype.kind == "i" and array.size and not 0 <= array.min() <= array.max() < size:
                raise ValueError(f"{name} must lie in [0, vocab_size={size}), got {array.min()} to {array.max()}")


def _numpy(tensor: Tensor, column: pa.DataType) -> np.ndarray:
    """In the dtype that is stored; token ids stay int64 until their range is known."""
    leaf = column.value_type.value_type if pa.types.is_fixed_size_list(column.value_type) else column.value_type
    dtype = torch.int64 if pa.types.is_integer(leaf) else {16: torch.float16, 32: torch.float32}[leaf.bit_width]
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def _one_list(array: np.ndarray, column: pa.DataType) -> pa.Array:
    tokens = column.value_type
    if pa.types.is_fixed_size_list(tokens):
        values = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1), tokens.value_type), type=tokens)
    else:
        values = pa.array(array, tokens)
    return pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), values, type=column)


def _write_shard(file: IO, columns: pa.Schema, rows: list[pa.RecordBatch]) -> None:
    with pq.ParquetWriter(
        file,
        columns,
        compression="zstd",
        use_dictionary=False,
        column_encoding=dict.fromkeys(_SPLIT_COLUMNS, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for row in rows:
            writer.write_batch(row)  # a row group each, so that a sequence is read without its neighbours


def _replace_durably(path: Path, write: Callable[[IO], None]) -> None:
    """After this returns `path` has what `write` wrote, whatever happens; before, it is as it was."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY_SUFFIX}")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(folder: Path) -> IO:
    """Held until closed or until the process is gone, however it goes: the kernel keeps it, so none can be stale."""
    file = open(folder / _LOCK_NAME, "a+")  # noqa: SIM115 (held by the writer)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise BlockingIOError(f"{folder} is being written by another writer, process {owner}") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
