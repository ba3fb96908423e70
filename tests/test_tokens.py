"""Entropy and log-probability of tokens against PyTorch's formulas."""

import pytest
import torch
from processes import Collectives
from support import (
    FLOATS,
    assert_gradient_within_rounding,
    assert_within_error_rule,
    leaf,
    make_logits,
    takes_fp64,
    widest,
)
from torch import distributed as dist

from eakd_kernels import distill_stats, token_entropy, token_logprob_entropy

VOCAB = 1003
WIDTHS = (401, 602)


def eager(logits, ids, temperature):
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], entropy


def problem(dtype=torch.float32, rows=(2, 3), vocab_size=VOCAB):
    logits, _ = make_logits(*rows, vocab_size, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    return logits, torch.randint(0, vocab_size, rows, generator=generator).to(logits.device)


def gradient(values, logits):
    """Of both values, each with an upstream gradient of its own."""
    upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in values]
    total = sum((x * g).sum() for x, g in zip(values, upstream[::-1], strict=True))
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(dtype, temperature, backend):
    if dtype == torch.float64 and not takes_fp64(backend):
        pytest.skip(f"{backend} does not compute in fp64")
    logits, ids = problem(dtype)
    got = token_logprob_entropy(logits, ids, temperature=temperature, backend=backend)
    wide = {d: leaf(logits, d) for d in (torch.float64, torch.float32)}
    exact, baseline = (eager(z, ids, temperature) for z in wide.values())
    for value, want, by_eager in zip(got, exact, baseline, strict=True):
        assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert_within_error_rule(value, want, by_eager, VOCAB)
    alone = token_entropy(logits, temperature=temperature, backend=backend)
    assert_within_error_rule(alone, exact[1], baseline[1], VOCAB)

    wanted = [gradient(values, z) for values, z in zip((exact, baseline), wide.values(), strict=True)]
    found = gradient(got, logits)
    assert found.dtype == dtype
    assert_gradient_within_rounding(found, *wanted)
    (of_entropy,) = torch.autograd.grad(alone.sum(), logits)
    wanted = [torch.autograd.grad(eager(z, ids, temperature)[1].sum(), z)[0] for z in (leaf(logits, d) for d in wide)]
    assert_gradient_within_rounding(of_entropy, *wanted)


def test_the_statistics_of_a_distillation(backend):
    logits, ids = problem(widest(backend))
    stats = distill_stats(logits, logits.detach(), ids, entropy_temperature=1.0, backend=backend)
    logprob, entropy = token_logprob_entropy(logits, ids, backend=backend)
    assert torch.equal(logprob, -stats.cross_entropy)
    assert torch.equal(entropy, stats.student_entropy)


def test_rows_left_out_are_not_read(backend):
    logits, ids = problem(widest(backend))
    mask = torch.tensor([[True, False, True], [True, True, False]], device=logits.device)
    ids[1, 1] = -100
    kept = mask & (ids != -100)
    spoilt = leaf(torch.where(kept[..., None], logits.detach(), torch.nan), logits.dtype)
    values = token_logprob_entropy(spoilt, ids, mask=mask, backend=backend)
    for value, want in zip(values, eager(logits, ids.clamp(min=0), 1.0), strict=True):
        torch.testing.assert_close(value[kept], want[kept], rtol=4e-6, atol=4e-6)
        assert not value[~kept].any()
    found = gradient(values, spoilt)
    assert found[kept].isfinite().all() and found[kept].any() and not found[~kept].any()
    assert not token_entropy(spoilt, mask=kept, backend=backend)[~kept].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_masked_columns_count_for_nothing(temperature, backend):
    logits, ids = problem(widest(backend))
    holes = leaf(logits, logits.dtype).detach().clone()
    holes[..., ::3] = -torch.inf
    holes[0, 0] = -torch.inf
    ids = ids // 3 * 3 + 1
    ids[1, 2] = 0
    holes.requires_grad_()
    logprob, entropy = token_logprob_entropy(holes, ids, temperature=temperature, backend=backend)
    wanted = leaf(holes, torch.float64)
    by_logprob, by_entropy = eager(wanted, ids, temperature)
    some = torch.ones(2, 3, dtype=torch.bool, device=logits.device)
    some[0, 0] = False
    assert logprob[1, 2] == -torch.inf
    torch.testing.assert_close(logprob[some].double(), by_logprob[some], rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(entropy[some].double(), by_entropy[some], rtol=4e-6, atol=4e-6)
    assert entropy[0, 0] == 0
    (found,) = torch.autograd.grad(entropy.sum(), holes)
    assert found.isfinite().all() and not found[..., ::3].any() and not found[0, 0].any()


def test_padded_vocabulary(backend):
    logits, ids = problem(widest(backend))
    ids %= 900
    whole = token_logprob_entropy(logits[..., :900].contiguous(), ids, backend=backend)
    values = token_logprob_entropy(logits, ids, vocab_size=900, backend=backend)
    for got, want in zip(values, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
    assert not gradient(values, logits)[..., 900:].any()


def test_gradient_in_place(kernels):
    logits, ids = problem()
    wanted = gradient(token_logprob_entropy(logits, ids, backend=kernels), logits)
    computed = logits * 1
    found = gradient(token_logprob_entropy(computed, ids, inplace_gradient=True, backend=kernels), computed)
    assert found.data_ptr() == computed.data_ptr()
    assert torch.equal(found, wanted)


def test_nothing_of_the_logits_size_is_kept(kernels):
    logits, ids = problem(rows=(8,), vocab_size=5000)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for temperature in (1.0, 2.0):
            token_logprob_entropy(logits, ids, temperature=temperature, backend=kernels)
            token_entropy(logits, temperature=temperature, backend=kernels)
    kept.pop(logits.untyped_storage().data_ptr())
    assert sum(kept.values()) <= 4 * 120 * len(ids)


def sharded(logits, ids, temperature, backend):
    first = sum(WIDTHS[: dist.get_rank()])
    own = logits[..., first : first + WIDTHS[dist.get_rank()]].clone().requires_grad_()
    with Collectives() as calls:
        values = token_logprob_entropy(
            own, ids, temperature=temperature, process_group=dist.group.WORLD, backend=backend
        )
    return [x.detach() for x in values], gradient(values, own), len(calls.calls)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sharded_vocabulary(temperature, world):
    logits, ids = problem()
    answers = world(2).run(sharded, logits.detach(), ids, temperature, "cpu")
    wanted = token_logprob_entropy(logits, ids, temperature=temperature, backend="cpu")
    for values, _, collectives in answers:
        assert collectives == 2  # sizes, statistics
        for got, want in zip(values, wanted, strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)
    found = torch.cat([answer[1] for answer in answers], -1)
    torch.testing.assert_close(found, gradient(wanted, logits), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_compile(temperature):
    logits, ids = problem()

    def values(logits, ids):
        logprob, entropy = token_logprob_entropy(logits, ids, temperature=temperature)
        return logprob, entropy, token_entropy(logits, temperature=temperature)

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")(logits, ids)
    for got, want in zip(compiled, values(logits, ids), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(gradient(compiled[:2], logits), gradient(values(logits, ids)[:2], logits))


Z, IDS = torch.randn(2, 5), torch.tensor([1, 4])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: token_entropy([1.0]), TypeError, "^logits must be a tensor"),
        (lambda: token_entropy(Z.int()), TypeError, "^logits must be float64"),
        (lambda: token_entropy(Z, temperature=0), ValueError, "^temperature must be a finite number > 0"),
        (lambda: token_entropy(Z, temperature=torch.ones(2)), TypeError, "^temperature must be a number > 0"),
        (lambda: token_entropy(Z, tau=2), TypeError, "did you mean 'temperature'"),
        (lambda: token_logprob_entropy(Z, IDS.int()), TypeError, r"^ids must be int64.*ids\.long"),
        (lambda: token_logprob_entropy(Z, IDS[:1]), ValueError, r"^ids must have the logits' leading shape \(2,\)"),
        (lambda: token_logprob_entropy(Z, IDS + 1), ValueError, "^ids must be in 0..4"),
        (lambda: token_entropy(Z, vocab_size=9), ValueError, "vocab_size must be in 1..5"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
