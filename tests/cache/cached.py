"""A cache of made-up sequences, for the tests of writers and readers."""

from pathlib import Path

import torch

from eakd_kernels.cache import Provenance, TeacherCacheReader, TeacherCacheWriter

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
