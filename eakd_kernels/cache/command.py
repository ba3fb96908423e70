"""`python -m eakd_kernels cache`: runs a transformers model over a corpus and keeps its top k."""

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import eakd_kernels

from .format import CacheError, Provenance, tokenizer_hash
from .writer import TeacherCacheWriter

CORPUS_HELP = """The corpus: .txt has a document a line, .jsonl an object a line, .parquet one a row; the latter two
have the document in --text-column. Blank documents are skipped. A document is tokenized as the tokenizer does by
itself, and cut into pieces of --max-length tokens, each a sequence of the cache."""


class Piece(NamedTuple):
    tokens: list[int]
    ends_document: bool


class Teacher(NamedTuple):
    """A model and how its logits are summarised."""

    model: nn.Module
    k: int
    temperature: float
    entropy_temperature: float
    batch_size: int

    @torch.inference_mode()
    def sequences(
        self, pieces: Sequence[Piece], progress: Callable[[Sequence[Piece]], None]
    ) -> list[tuple[Tensor, ...]]:
        """What `TeacherCacheWriter.append` takes, for every piece, in order. Batches have pieces of similar length."""
        by_length = sorted(range(len(pieces)), key=lambda i: len(pieces[i].tokens))
        results: dict[int, tuple[Tensor, ...]] = {}
        for start in range(0, len(pieces), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            results |= zip(chosen, self._batch([torch.tensor(pieces[i].tokens) for i in chosen]), strict=True)
            progress([pieces[i] for i in chosen])
        return [results[i] for i in range(len(pieces))]

    def _batch(self, tokens: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        lengths = [len(t) for t in tokens]
        device = self.model.device
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        logits = self.model(
            input_ids=pad_sequence(tokens, batch_first=True).to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
        top = eakd_kernels.teacher_topk(
            logits, self.k, temperature=self.temperature, entropy_temperature=self.entropy_temperature
        )
        top = [tensor.cpu() for tensor in top]
        for row, (length, ids) in enumerate(zip(lengths, tokens, strict=True)):
            yield ids, *(tensor[row, :length] for tensor in top)


def read_documents(path: Path, column: str) -> Iterator[str]:
    """Raises CacheError for a format that is not known, a line that is no JSON, and a column that is not there."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise CacheError(f"{path}: a corpus is one of {', '.join(readers)}")
    return (text for text in readers[path.suffix](path, column) if text.strip())


def _read_txt(path: Path, column: str) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from (line.rstrip("\r\n") for line in file)


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_read_txt(path, column), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
        except (ValueError, TypeError, KeyError) as error:
            raise CacheError(f"{path}, line {number}: no JSON object with {column!r} ({error!r})") from error
        yield _checked(text, f"{path}, line {number}")


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise CacheError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _checked(text, f"{path}, row {number}")
                number += 1


def _checked(text, where: str) -> str:
    if not isinstance(text, str):
        raise CacheError(f"{where}: the text is a {type(text).__name__}")
    return text


def cut(documents: Iterator[str], tokenizer, max_length: int) -> Iterator[Piece]:
    for text in documents:
        tokens = tokenizer(text, verbose=False)["input_ids"]  # its warning of long texts does not apply to pieces
        for start in range(0, len(tokens), max_length):
            end = start + max_length
            yield Piece(tokens[start:end], end >= len(tokens))


def write_corpus(
    pieces: Iterator[Piece], teacher: Teacher, writer: TeacherCacheWriter, documents: int
) -> tuple[int, int]:
    """Goes on behind what is written. Returns how many sequences and tokens were added.

    The teacher sees whole shards: batches are then the same, and so are the numbers to the last bit, wherever an
    earlier run was interrupted."""
    from tqdm import tqdm  # transformers brings it along

    start, tokens, sequences = time.perf_counter(), 0, 0
    with tqdm(total=documents, unit=" documents") as bar:

        def progress(done: Sequence[Piece]) -> None:
            nonlocal tokens
            tokens += sum(len(piece.tokens) for piece in done)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            bar.update(sum(piece.ends_document for piece in done))

        bar.update(sum(piece.ends_document for piece in islice(pieces, writer.rows_written)))
        while shard := list(islice(pieces, writer.rows_per_shard)):
            for sequence in teacher.sequences(shard, progress):
                writer.append(*sequence)
            sequences += len(shard)
    return sequences, tokens


def load_teacher(options: argparse.Namespace):
    """Model and tokenizer."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("`python -m eakd_kernels cache` runs the teacher with transformers: pip install transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.teacher, **source)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=options.dtype, **source)
    return model.to(options.device).eval(), tokenizer


def provenance_of(options: argparse.Namespace, model: nn.Module, tokenizer) -> Provenance:
    settings = {
        "corpus_sha256": _sha256(options.corpus),
        "text_column": options.text_column,
        "max_length": str(options.max_length),
        "dtype": str(model.dtype).removeprefix("torch."),
        "gguf_file": options.gguf_file,
    }
    return Provenance(
        teacher=options.teacher,
        tokenizer=tokenizer_hash(tokenizer),
        vocab_size=model.config.get_text_config().vocab_size,
        k=options.k,
        temperature=options.temperature,
        entropy_temperature=options.entropy_temperature,
        settings=settings,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def run(options: argparse.Namespace) -> str:
    """Returns what was done, in a line."""
    # All of it once: a line that cannot be read is better found now than after hours, and progress has an end.
    documents = sum(1 for _ in read_documents(options.corpus, options.text_column))
    model, tokenizer = load_teacher(options)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and options.max_length > longest:
        raise CacheError(f"--max-length {options.max_length} is more than the teacher's {longest} positions")
    provenance = provenance_of(options, model, tokenizer)
    teacher = Teacher(model, options.k, options.temperature, options.entropy_temperature, options.batch_size)
    with TeacherCacheWriter(
        options.out, provenance, rows_per_shard=options.rows_per_shard, resume=options.resume
    ) as writer:
        pieces = cut(read_documents(options.corpus, options.text_column), tokenizer, options.max_length)
        sequences, tokens = write_corpus(pieces, teacher, writer, documents)
    return f"{options.out}: {writer.rows_written} sequences, {sequences} of them ({tokens} tokens) from this run"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m eakd_kernels cache", description="Cache a teacher's top k over a corpus.", epilog=CORPUS_HELP
    )
    add = result.add_argument
    add("--teacher", required=True, metavar="NAME_OR_PATH", help="a causal language model that transformers loads")
    add("--gguf-file", default="", metavar="NAME", help="the file to load, if the teacher is in GGUF")
    add("--corpus", required=True, type=Path, metavar="FILE", help=".txt, .jsonl or .parquet, see below")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the cache")
    add("--text-column", default="text", help="of .jsonl and .parquet (default: %(default)s)")
    add("--k", type=_positive(int), default=64, help="log-probabilities kept a token (default: %(default)s)")
    add("--temperature", type=_positive(float), default=1.0, help="of the log-probabilities (default: %(default)s)")
    add("--entropy-temperature", type=_positive(float), default=1.0, help="of the entropy (default: %(default)s)")
    add("--max-length", type=_positive(int), default=1024, help="tokens of a sequence (default: %(default)s)")
    add("--batch-size", type=_positive(int), default=8, help="sequences at a time (default: %(default)s)")
    add("--rows-per-shard", type=_positive(int), default=256, help="sequences a file (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as the model is")
    add("--resume", action="store_true", help="go on behind what an interrupted run has written")
    return result


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def main(arguments: Sequence[str]) -> None:
    """Exits with a message where the user can mend what is wrong."""
    options = parser().parse_args(arguments)
    try:
        print(run(options))
    except (CacheError, OSError, ImportError) as error:
        sys.exit(f"python -m eakd_kernels cache: {error}")
