"""What a shard is: its name, its columns, its metadata, and how it is opened and checked."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT_VERSION = 1
_METADATA_KEY = b"eakd_kernels"
_SHARD_NAME = re.compile(r"shard-\d{6,}\.parquet")


class CacheError(ValueError):
    """A cache that is damaged, incomplete, not ours, or of another teacher than was asked for."""


@dataclass(frozen=True)
class Provenance:
    """Where a cache's numbers come from. Two caches with the same sequences and provenance are interchangeable.

    Attributes:
        teacher: name or path of the model.
        tokenizer: what `tokenizer_hash` says of its tokenizer.
        vocab_size: columns of the teacher's logits.
        k: log-probabilities kept a token, at most vocab_size.
        temperature: of the log-probabilities and of the log-sum-exp.
        entropy_temperature: of the entropy.
        settings: anything else that decides the numbers (corpus, longest sequence, dtype ...), as strings.

    Raises CacheError where k or vocab_size is no int, or one of these or a temperature is out of range."""

    teacher: str
    tokenizer: str
    vocab_size: int
    k: int
    temperature: float
    entropy_temperature: float
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("vocab_size", "k"):
            if type(getattr(self, name)) is not int:
                raise CacheError(f"{name} must be an int, got {getattr(self, name)!r}")
        if not 1 <= self.k <= self.vocab_size:
            raise CacheError(f"k must be between 1 and vocab_size={self.vocab_size}, got {self.k}")
        for name in ("temperature", "entropy_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise CacheError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def require(self, other: "Provenance", where: Path) -> None:
        """Raises CacheError that names everything in which `other`, found in `where`, differs."""
        pairs = {f.name: (getattr(other, f.name), getattr(self, f.name)) for f in fields(self)}
        theirs, ours = pairs.pop("settings")
        pairs |= {f"settings[{key!r}]": (theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours})}
        differences = [f"{name} is {there!r}, not {here!r}" for name, (there, here) in pairs.items() if there != here]
        if differences:
            raise CacheError(f"{where} is another cache: {'; '.join(differences)}")


def tokenizer_hash(tokenizer) -> str:
    """SHA-256, in hexadecimal, of a tokenizer's vocabulary (tokens with their ids, sorted) and of its special ids.

    Which roles special tokens have does not count: `tokenizer.pad_token = tokenizer.eos_token` changes no id.

    tokenizer: a transformers tokenizer; anything with `get_vocab()`, and `all_special_ids` if it has special tokens."""
    special = sorted({int(token) for token in getattr(tokenizer, "all_special_ids", ())})
    content = json.dumps([sorted(tokenizer.get_vocab().items()), special], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.parquet"


def shard_paths(folder: Path) -> list[Path]:
    """A cache's files in order. Raises CacheError for one that is missing and for Parquet files of other names."""
    found = sorted(folder.glob("*.parquet"), key=lambda path: (len(path.name), path.name))
    if foreign := [path for path in found if not _SHARD_NAME.fullmatch(path.name)]:
        raise CacheError(f"{foreign[0]} is not part of a teacher cache; give the cache a folder of its own")
    for number, path in enumerate(found):
        if path != shard_path(folder, number):
            raise CacheError(f"{shard_path(folder, number)} is missing, though there is {path.name}")
    return found


def schema(provenance: Provenance, rows_per_shard: int) -> pa.Schema:
    from .. import __version__

    header = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "rows_per_shard": rows_per_shard,
        "provenance": asdict(provenance),
    }
    return _columns(provenance.k).with_metadata({_METADATA_KEY: json.dumps(header, sort_keys=True)})


def _columns(k: int) -> pa.Schema:
    def per_token(dtype: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", dtype))

    def top_k(dtype: pa.DataType) -> pa.DataType:
        return per_token(pa.list_(pa.field("element", dtype), k))

    return pa.schema(
        {
            "input_ids": per_token(pa.int32()),
            "ids": top_k(pa.int32()),
            "logprobs": top_k(pa.float16()),
            "entropy": per_token(pa.float32()),
            "lse": per_token(pa.float32()),
        }
    )


@dataclass(frozen=True)
class Shard:
    """An open file. One row group is one sequence."""

    path: Path
    file: pq.ParquetFile
    provenance: Provenance
    rows_per_shard: int

    @property
    def rows(self) -> int:
        return self.file.metadata.num_rows

    def read(self, row: int) -> pa.RecordBatch:
        """One sequence as a batch of one row. Raises CacheError where checksums or lengths are wrong."""
        try:
            # One thread: DataLoader workers are forks, and Arrow's threads do not come along.
            (batch,) = self.file.read_row_group(row, use_threads=False).to_batches()
            batch.validate()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{self.path}, row {row}, is damaged: {error}") from error
        lengths = {len(column.values) for column in batch.columns}
        if batch.num_rows != 1 or len(lengths) != 1:
            raise CacheError(f"{self.path}, row {row}, is damaged: its columns have {sorted(lengths)} tokens")
        return batch


def open_shard(path: Path) -> Shard:
    """Reads the footer; sequences are mapped into memory and read when asked for.

    Raises CacheError where the file is truncated, damaged, not of a teacher cache, or of a newer version."""
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not Arrow's: no such file, no permission
        raise CacheError(f"{path} is truncated or damaged, or no Parquet file: {error}") from error
    found = _metadata(path, file)
    try:
        header = json.loads(found)
        newer = header["format_version"] > FORMAT_VERSION
        if not newer:
            provenance = Provenance(**header["provenance"])
            shard = Shard(path, file, provenance, int(header["rows_per_shard"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} has other metadata than a teacher cache: {error!r}") from error
    if newer:
        raise CacheError(
            f"{path} has format version {header['format_version']}, written by eakd_kernels "
            f"{header.get('package_version')}; this version reads up to {FORMAT_VERSION}"
        )
    if not file.schema_arrow.equals(_columns(provenance.k)):
        columns = file.schema_arrow.remove_metadata()
        raise CacheError(f"{path} has other columns than a teacher cache of k={provenance.k}:\n{columns}")
    groups = file.metadata.num_row_groups
    if not shard.rows == groups <= shard.rows_per_shard:
        raise CacheError(
            f"{path} has {shard.rows} rows in {groups} row groups, not one each, or over {shard.rows_per_shard}"
        )
    return shard


def _metadata(path: Path, file: pq.ParquetFile) -> bytes:
    found = (file.schema_arrow.metadata or {}).get(_METADATA_KEY)
    if found is None:
        raise CacheError(f"{path} was not written by eakd_kernels: its metadata has no {_METADATA_KEY.decode()!r}")
    # Arrow keeps it in the file's metadata and again in the schema's. The footer has no checksum, this takes its place.
    if (file.metadata.metadata or {}).get(_METADATA_KEY) != found:
        raise CacheError(f"{path} has damaged metadata: its two copies differ")
    return found
