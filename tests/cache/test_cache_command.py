"""`python -m eakd_kernels cache` from text to training, with a tiny model of random weights."""

import json
import re
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers

from eakd_kernels.cache import TeacherCacheReader, command, tokenizer_hash

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DOCUMENTS = [" ".join(WORDS[i % 10 :] + WORDS[: i % 7]) for i in range(11)]
K, TEMPERATURE, ENTROPY_TEMPERATURE, MAX_LENGTH = 5, 2.0, 1.5, 6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder that transformers loads a model and a tokenizer from."""
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=16, max_position_embeddings=32, initializer_range=0.5, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(teacher, tmp_path, capsys):
    """Runs the command; returns the cache's folder."""

    def run(corpus, *more, out="cache"):
        options = {"--teacher": teacher, "--corpus": corpus, "--out": tmp_path / out, "--k": K, "--batch-size": 3}
        options |= {"--temperature": TEMPERATURE, "--entropy-temperature": ENTROPY_TEMPERATURE}
        options |= {"--max-length": MAX_LENGTH, "--rows-per-shard": 4, "--device": "cpu"}
        command.main([str(part) for pair in options.items() for part in pair] + [str(part) for part in more])
        return tmp_path / out

    return run


def write_txt(path):
    path.write_text("\n\n".join(DOCUMENTS) + "\n \n")


def write_jsonl(path):
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in [*DOCUMENTS, " "]))


def write_parquet(path):
    pq.write_table(pa.table({"other": range(len(DOCUMENTS)), "text": DOCUMENTS}), path, row_group_size=4)


@pytest.fixture
def corpus(tmp_path):
    write_txt(tmp_path / "corpus.txt")
    return tmp_path / "corpus.txt"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def pieces(tokenizer):
    for text in DOCUMENTS:
        ids = tokenizer(text)["input_ids"]
        yield from (ids[start : start + MAX_LENGTH] for start in range(0, len(ids), MAX_LENGTH))


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_parquet])
def test_text_becomes_a_cache(run, teacher, tmp_path, capsys, write):
    """Every piece of every document in order, with what the model says of it alone, unpadded."""
    corpus = tmp_path / f"corpus.{write.__name__.removeprefix('write_')}"
    write(corpus)
    folder = run(corpus)
    printed = capsys.readouterr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    reader, expected = TeacherCacheReader(folder, tokenizer=tokenizer, vocab_size=16), list(pieces(tokenizer))
    assert [sequence.input_ids.tolist() for sequence in reader] == expected
    tokens = sum(map(len, expected))
    assert f"{len(expected)} sequences, {len(expected)} of them ({tokens} tokens) from this run" in printed.out
    assert "11/11" in printed.err and "tokens/s" in printed.err
    for sequence in reader:
        with torch.no_grad():
            logits = model(input_ids=sequence.input_ids[None]).logits[0]
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        assert torch.equal(sequence.ids.sort().values, log_p.topk(K).indices.sort().values)
        torch.testing.assert_close(sequence.logprobs, log_p.gather(-1, sequence.ids), rtol=2**-10, atol=1e-4)
        entropy = torch.distributions.Categorical(logits=logits / ENTROPY_TEMPERATURE).entropy()
        torch.testing.assert_close(sequence.entropy, entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sequence.lse, (logits / TEMPERATURE).logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_provenance(run, corpus, teacher):
    found = TeacherCacheReader(run(corpus)).provenance
    assert (found.teacher, found.vocab_size, found.k) == (str(teacher), 16, K)
    assert (found.temperature, found.entropy_temperature) == (TEMPERATURE, ENTROPY_TEMPERATURE)
    assert found.tokenizer == tokenizer_hash(transformers.AutoTokenizer.from_pretrained(teacher))
    assert found.settings["dtype"] == "float32" and found.settings["max_length"] == str(MAX_LENGTH)


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5, 6])
def test_interrupted_and_resumed(run, corpus, tmp_path, capsys, monkeypatch, batches):
    """The same bytes as in one go, batches included, and nothing that is written is computed again."""
    whole, calls = run(corpus, out="whole"), 0
    forward = transformers.LlamaForCausalLM.forward

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > batches:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.LlamaForCausalLM, "forward", interrupted)
        run(corpus)
    written = len(TeacherCacheReader(tmp_path / "cache")) if batches >= 2 else 0  # two batches a shard
    assert written == 4 * (batches // 2)
    capsys.readouterr()
    resumed = run(corpus, "--resume")
    assert bytes_of(resumed) == bytes_of(whole)
    rows = len(TeacherCacheReader(whole))
    assert f"{rows} sequences, {rows - written} of them" in capsys.readouterr().out
    run(corpus, "--resume")
    assert bytes_of(resumed) == bytes_of(whole)


def test_mistakes_are_messages(run, corpus, tmp_path):
    (tmp_path / "corpus.csv").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    write_parquet(tmp_path / "corpus.parquet")
    for arguments, message in (
        ([tmp_path / "none.txt"], r"none\.txt"),
        ([tmp_path / "corpus.csv"], r"one of \.txt, \.jsonl, \.parquet"),
        ([tmp_path / "broken.jsonl"], r"broken\.jsonl, line 2: no JSON object with 'text'"),
        ([tmp_path / "broken.jsonl", "--text-column", "body"], "line 1: no JSON object with 'body'"),
        ([tmp_path / "numbers.jsonl"], "line 1: the text is a int"),
        ([tmp_path / "corpus.parquet", "--text-column", "body"], "no column 'body'; it has other, text"),
        ([corpus, "--max-length", 33], "33 is more than the teacher's 32 positions"),
        ([corpus, "--k", 17], "k must be between 1 and vocab_size=16, got 17"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
    assert not (tmp_path / "cache").exists()
    run(corpus)
    with pytest.raises(SystemExit, match=r"has a teacher cache; .*--resume\) goes on"):
        run(corpus)
    with pytest.raises(SystemExit, match="k is 5, not 4"):
        run(corpus, "--resume", "--k", 4)
    corpus.write_text("one two")
    with pytest.raises(SystemExit, match="corpus_sha256"):
        run(corpus, "--resume")


@pytest.mark.parametrize("option", [("--k", "0"), ("--temperature", "nan"), ("--batch-size", "x")])
def test_impossible_options(run, corpus, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(corpus, *option)
    assert f"argument {option[0]}: " in capsys.readouterr().err


def test_it_is_a_command_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eakd_kernels", "cache", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("eakd_kernels", run_name="__main__")
    assert "--teacher NAME_OR_PATH" in capsys.readouterr().out


def test_missing_packages_are_named(run, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        run(corpus)
    for name in [name for name in sys.modules if name.startswith("eakd_kernels.cache")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        import eakd_kernels.cache  # noqa: F401


def test_the_manual_runs(run, corpus, teacher, tmp_path, monkeypatch):
    """docs/cache.md, on the tiny teacher's cache."""
    manual = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    run(corpus)
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    student = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    names = {"tokenizer": tokenizer, "student": student, "optimizer": torch.optim.AdamW(student.parameters())}
    blocks = re.findall(r"```python\n(.*?)```", manual, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/cache.md", "exec"), names)
    assert names["loss"].isfinite()
