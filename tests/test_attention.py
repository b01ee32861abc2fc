"""Packed attention: exact against separate sequences, in every family that may pack."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import attention

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "olmo2": {},
    "gpt_neox": {},
}
# These carry something from token to token beside attention, or have sinks.
CANNOT_PACK = {
    "minimax": {},
    "gpt_oss": {"num_local_experts": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "qwen3_next": {},
}
LENGTHS = [7, 7, 12, 9]  # neighbours of one length are computed together


def a_model(family, settings):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **settings))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # else attention would be nearly uniform
    return lm.double().eval()


def random_sequences():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (n,), generator=g) for n in LENGTHS]


def states_apart(lm):
    lm.set_attn_implementation("eager")
    alone = [lm.base_model(input_ids=ids[None], use_cache=False) for ids in random_sequences()]
    return torch.cat([output.last_hidden_state[0] for output in alone])


def states_packed(lm, lengths=LENGTHS):
    assert attention.use_packed(lm)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    output = lm.base_model(
        input_ids=torch.cat(random_sequences())[None],
        position_ids=positions[None],
        use_cache=False,
        **{attention.LENGTHS: lengths},
    )
    return output.last_hidden_state[0]


def gradient(lm, states):
    lm.zero_grad()
    states.sin().sum().backward()
    return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_computed_as_if_each_were_alone(family):
    lm = a_model(family, FAMILIES[family])
    wanted, got = states_apart(lm), states_packed(lm)
    # transformers computes the positions' rotations and the softmax in float32
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    wanted_gradient, got_gradient = gradient(lm, wanted), gradient(lm, got)
    assert (got_gradient - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()
    as_one = states_packed(lm, [sum(LENGTHS)])  # negative control: each sees those before it
    assert (as_one - wanted).norm() > 1e-2 * wanted.norm()


def test_positions_that_depend_on_the_longest_sequence_are_not_packed():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not attention.use_packed(a_model("llama", {"rope_parameters": rope}))
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert attention.use_packed(a_model("llama", {"rope_parameters": rope}))  # negative control


@pytest.mark.parametrize("family", CANNOT_PACK)
def test_a_model_that_would_leak_keeps_its_own_attention(family):
    lm = a_model(family, CANNOT_PACK[family])
    before = lm.config._attn_implementation
    assert not attention.use_packed(lm)
    assert lm.config._attn_implementation == before


def test_a_soft_cap_is_not_dropped_where_a_model_cannot_pack():
    """transformers' sdpa attention leaves it out without a word."""
    for settings, wanted in ((FAMILIES["gemma2"], "eager"), ({}, "sdpa")):
        lm = a_model("gemma2", {"query_pre_attn_scalar": 8} | settings)
        lm.set_attn_implementation("sdpa")
        lm.config.attn_logit_softcapping = settings.get("attn_logit_softcapping")
        lm.config.layer_types = ["full_attention", "linear_attention"]
        assert not attention.use_packed(lm)
        assert lm.config._attn_implementation == wanted


def test_the_soft_cap_and_the_window_matter_here():
    """Negative control: without them the states of Gemma 2 are others."""
    settings = FAMILIES["gemma2"]
    wanted = states_apart(a_model("gemma2", settings))
    for change in ({"attn_logit_softcapping": None}, {"sliding_window": 64}):
        lm = a_model("gemma2", settings)
        for name, value in change.items():
            setattr(lm.config, name, value)
        for layer in lm.model.layers:
            if "sliding_window" in change and layer.self_attn.sliding_window:
                layer.self_attn.sliding_window = 64
            if "attn_logit_softcapping" in change:
                layer.self_attn.attn_logit_softcapping = None
        assert (states_packed(lm) - wanted).norm() > 1e-3 * wanted.norm()
