"""The output layer in chunks: its gradient, its precision, its memory."""

import pytest
import torch
from helpers import error, flat_gradient, tiny_lm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from common import head
from common.model import Policy


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_do_not_change_log_probabilities_entropies_or_gradient(monkeypatch, chunk):
    ids, response = torch.arange(3, 12), torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    results = []
    for size in (chunk, 1000):
        monkeypatch.setattr(head, "CHUNK", size)
        lm = tiny_lm()
        logp, entropy = Policy(lm, 0.7)(ids, response, [5, 4], with_entropy=True)
        (logp.sin().sum() + entropy.cos().sum()).backward()
        results.append((logp, entropy, flat_gradient(lm)))
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def small_head(family, bias=False, **settings):
    """A float64 model of a family with 7 words, of which only the output layer is used here."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **settings))
    lm.set_output_embeddings(torch.nn.Linear(4, 7, bias=bias))
    return lm.double()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"bias": True}),
        ("gemma2", {"head_dim": 4, "final_logit_softcapping": 1.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_the_gradient_is_that_of_differences(monkeypatch, family, settings, with_entropy):
    monkeypatch.setattr(head, "CHUNK", 2)
    lm = small_head(family, **settings)
    layer = lm.get_output_embeddings()
    hidden = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])

    def outputs(hidden, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        with torch.nn.utils.stateless._reparametrize_module(layer, dict(zip(names, parameters))):
            found = head.token_log_probs(lm, hidden, targets, 0.7, with_entropy)
        return found if with_entropy else found[0]

    assert torch.autograd.gradcheck(outputs, (hidden, *layer.parameters()))


def test_a_gradient_over_128_chunks_is_rounded_once(monkeypatch):
    """Against float64, in bfloat16: the error is that of rounding, not of 128 sums."""
    torch.manual_seed(0)
    lm = small_head("llama")
    layer = torch.nn.Linear(16, 7, bias=False).bfloat16()
    lm.set_output_embeddings(layer)
    hidden, targets = torch.randn(256, 16).bfloat16(), torch.randint(0, 7, (256,))
    exact = layer.weight.detach().double().requires_grad_()
    (hidden.double() @ exact.T).log_softmax(-1)[torch.arange(256), targets].sum().backward()
    errors = []
    for chunk in (2, 256):
        monkeypatch.setattr(head, "CHUNK", chunk)
        layer.weight.grad = None
        logp, _ = head.token_log_probs(lm, hidden, targets, 1.0)
        assert logp.dtype == torch.float32
        logp.sum().backward()
        errors.append(error(layer.weight.grad.double(), exact.grad))
    assert max(errors) < 3e-3 and errors[0] < 1.5 * errors[1]
    layer.weight.grad = None  # negative control: autograd rounds each chunk's sum
    for states, tokens in zip(hidden.split(2), targets.split(2), strict=True):
        head.token_log_probs(lm, states, tokens, 1.0)[0].sum().backward()
    assert error(layer.weight.grad.double(), exact.grad) > 3 * errors[0]


def test_products_of_bfloat16_numbers_are_float32():
    """Against float64; bfloat16 products, the negative control, are a hundred times as far off."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape).bfloat16() for shape in ((6, 64), (50, 64), (50,)))
    exact = x.double() @ w.double().T + b.double()
    products = head.product(x, w, b)
    assert products.dtype == torch.float32
    largest = (products - exact).abs().max()
    linear = torch.nn.functional.linear(x, w, b)
    assert largest < 1e-5 and (linear.double() - exact).abs().max() > 100 * largest


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_logits_of_a_large_vocabulary_never_exist_all_at_once(monkeypatch):
    """What waits for the backward pass is a few numbers per token.

    With 152k words and 16k tokens, all logits would take 10 GB.
    """
    vocabulary, tokens, width, kept = 152_000, 300, 4, []
    monkeypatch.setattr(head, "CHUNK", 32)
    policy = Policy(tiny_lm().float(), 1.0)
    policy.lm.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
    weight = policy.lm.lm_head.weight
    states = torch.randn(tokens, width, requires_grad=True)
    policy.states_before = lambda ids, response, lengths: states
    ids = torch.randint(0, vocabulary, (tokens,))
    note = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with Sizes() as sizes:
        with note:
            logp, _ = policy(ids, torch.ones_like(ids).bool(), [tokens])
        logp.sum().backward()
    assert logp.shape == (tokens,) and weight.grad is not None
    kept = [x.numel() for x in kept if x.data_ptr() != weight.data_ptr()]
    assert sizes.largest <= 32 * vocabulary and sum(kept) <= 20 * tokens
