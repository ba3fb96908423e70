"""Tiny models, data and a tokenizer, made here: nothing is downloaded."""

import torch
from support import eager

VOCAB, LENGTH = 96, 12


def qwen2(seed, vocab_size=VOCAB, width=32):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def rows(count, vocab_size=VOCAB):
    """Sequences with uneven numbers of labels, the first of them on some first tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocab_size, (count, LENGTH), generator=generator)
    made = []
    for number, row in enumerate(ids):
        labels = row.clone()
        labels[: number % 5] = -100
        length = LENGTH - number % 3
        labels[length:] = -100
        attended = (torch.arange(LENGTH) < length).long()
        made.append({"input_ids": row, "attention_mask": attended, "labels": labels})
    return made


def batch(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def shifted(labels):
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100)


def ea_rows(student, teacher, labels, ce_weight=0.0):
    """[rows kept]: losses with the adapters' settings, entropy_temperature=1 and weight_norm="bound", by PyTorch."""
    out = eager(student, teacher, labels, t=1.0)
    weight = out["weight"] / torch.tensor(float(student.shape[-1])).log()
    return (weight * out["divergence"] + ce_weight * out["cross_entropy"])[labels != -100]


def tokenizer(vocab_size=512):
    """A byte-level BPE of the Python manual's topics, with a chat template."""
    from pydoc_data import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        list(topics.topics.values())[:20], vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made
