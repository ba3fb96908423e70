"""Teacher cache: what a teacher says about a corpus, computed once and kept in Parquet files.

A sequence is a row: its tokens, and for every token the teacher's K likeliest next tokens, their log-probabilities, the
exact entropy and the log-sum-exp. `TeacherCacheWriter` survives being killed, `TeacherCacheReader` is a torch Dataset,
`collate` makes batches that `topk_ea_kd_loss` takes, `python -m eakd_kernels cache` runs a transformers model over a
file of text. docs/cache.md has the format and what is guaranteed.
"""

try:
    import pyarrow  # noqa: F401
except ImportError as error:
    raise ImportError(f"eakd_kernels.cache needs pyarrow: pip install pyarrow ({error})") from error

from .format import CacheError, Provenance, tokenizer_hash
from .reader import CachedBatch, CachedSequence, TeacherCacheReader, collate
from .writer import TeacherCacheWriter

__all__ = [
    "CacheError",
    "CachedBatch",
    "CachedSequence",
    "Provenance",
    "TeacherCacheReader",
    "TeacherCacheWriter",
    "collate",
    "tokenizer_hash",
]
