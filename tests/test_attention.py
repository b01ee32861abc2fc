"""Packed attention: exact against separate sequences, in every family that may pack."""

import pytest
import torch
from helpers import error, flat_gradient
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
IDS = torch.randint(3, 64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def a_model(family, settings):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | settings))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # else attention would be nearly uniform
    return lm.double().eval()


def apart(lm):
    """(states (T, D), gradient) of the sequences, each computed by itself."""
    lm.set_attn_implementation("eager")
    alone = [lm.base_model(input_ids=ids[None], use_cache=False) for ids in IDS.split(LENGTHS)]
    return with_gradient(lm, torch.cat([output.last_hidden_state[0] for output in alone]))


def packed(lm, lengths=LENGTHS):
    """The same of the sequences in one row."""
    assert attention.use_packed(lm)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    more = {"position_ids": positions[None], attention.LENGTHS: attention.Lengths(lengths)}
    output = lm.base_model(input_ids=IDS[None], use_cache=False, **more)
    return with_gradient(lm, output.last_hidden_state[0])


def with_gradient(lm, states):
    lm.zero_grad()
    states.sin().sum().backward()
    return states, flat_gradient(lm.base_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_computed_as_if_each_were_alone(family):
    lm = a_model(family, FAMILIES[family])
    (wanted, wanted_gradient), (got, gradient) = apart(lm), packed(lm)
    # transformers computes the positions' rotations and the softmax in float32
    assert error(got, wanted) < 1e-5 and error(gradient, wanted_gradient) < 1e-5
    as_one, _ = packed(lm, [sum(LENGTHS)])  # negative control: each sees those before it
    assert error(as_one, wanted) > 1e-2


@pytest.mark.parametrize("change", [{"attn_logit_softcapping": 9.0}, {"sliding_window": 64}])
def test_the_soft_cap_and_the_window_matter_here(change):
    """Negative control: with others the states of Gemma 2 are others."""
    wanted, _ = apart(a_model("gemma2", FAMILIES["gemma2"]))
    assert error(packed(a_model("gemma2", FAMILIES["gemma2"] | change))[0], wanted) > 1e-3


@pytest.mark.parametrize("kind, can_pack", [("dynamic", False), ("linear", True)])
def test_positions_that_depend_on_the_longest_sequence_are_not_packed(kind, can_pack):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    assert attention.use_packed(a_model("llama", {"rope_parameters": rope})) == can_pack


@pytest.mark.parametrize("family", CANNOT_PACK)
def test_a_model_that_would_leak_keeps_its_own_attention(family):
    lm = a_model(family, CANNOT_PACK[family])
    before = lm.config._attn_implementation
    assert not attention.use_packed(lm) and lm.config._attn_implementation == before


@pytest.mark.parametrize("softcap, wanted", [(0.5, "eager"), (None, "sdpa")])
def test_a_soft_cap_is_not_dropped_where_a_model_cannot_pack(softcap, wanted):
    """transformers' sdpa attention leaves it out without a word."""
    lm = a_model("gemma2", FAMILIES["gemma2"])
    lm.set_attn_implementation("sdpa")
    lm.config.attn_logit_softcapping = softcap
    lm.config.layer_types = ["full_attention", "linear_attention"]
    assert not attention.use_packed(lm) and lm.config._attn_implementation == wanted
