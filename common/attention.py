"""Attention over sequences that stand one after the other in one row, without padding.

transformers lets a program register an attention function of its own. This one calls torch's
attention for one sequence at a time, or for neighbours of one length, so that no token sees another
sequence, and no padding is computed.
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "packed"  # of the attention function, among those of transformers
LENGTHS = "packed_lengths"  # the keyword under which a model is given the sequences' lengths


class Lengths:
    """The tokens of each sequence, in an object of which torch.compile checks the class alone.

    It would build the numbers of a list into its graphs, and compile again for each new list.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = tokens


@torch.compiler.disable  # what stands before and after it in a block is compiled
def packed_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    packed_lengths: Lengths,
    **unused,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; called by transformers.

    Args:
        query: (1, H, T, d); key and value have the same shape, or fewer heads.
        scaling: of the scores, 1/sqrt(d) if it is not given.
        sliding_window: a token sees itself and so many less one before it; all if not given.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        packed_lengths: the tokens of each sequence; their sum is T.

    Returns (1, T, H, d), and None in place of the attention weights.
    """
    if attention_mask is not None:
        raise ValueError("this model has an attention mask of its own, which packing would drop")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs, start = [], 0
    # Neighbours of one length are computed together.
    for length, equal in groupby(packed_lengths.tokens):
        stop = start + length * len(list(equal))
        q, k, v = (  # (sequences, heads, length, d)
            x[0, :, start:stop].unflatten(1, (-1, length)).transpose(0, 1)
            for x in (query, key, value)
        )
        mask = None
        if sliding_window is not None and sliding_window < length:
            mask = causal_mask(length, sliding_window, q.device)
        if softcap is None:
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            if mask is None:
                mask = causal_mask(length, length, q.device)
            out = softcapped_attention(q, k, v, mask, scaling, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (sequences * length, H, d)
        start = stop
    return torch.cat(outputs)[None], None


def softcapped_attention(q, k, v, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    """Attention with a cap on its scores, which torch's own attention does not have."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scaling / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def causal_mask(length: int, window: int, device) -> Tensor:
    """(length, length) bool: which tokens (columns) a token (line) sees."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def use_packed(lm) -> bool:
    """Make a Hugging Face model use `packed_attention` if that is exact for it; say whether.

    It is not if a layer carries something from token to token in another way (convolutions, linear
    attention, states), if its attention has sinks or does not go through transformers' interface,
    or if its positions are encoded by the longest sequence in sight (dynamic and long RoPE). Such a
    model keeps its own attention, and computes one sequence at a time.
    """
    from transformers import AttentionInterface

    kinds = set(getattr(lm.config, "layer_types", None) or ["full_attention"])
    has_sinks = any(name.endswith("sinks") for name, _ in lm.named_parameters())
    can_pack = (
        lm._supports_attention_backend
        and not lm._is_stateful
        and kinds <= {"full_attention", "sliding_attention"}
        and not has_sinks
        and not rope_types(lm.config) & {"dynamic", "longrope"}
    )
    if can_pack:
        AttentionInterface.register(NAME, packed_attention)  # under which no mask is made
        lm.set_attn_implementation(NAME)
    else:
        keep_softcap(lm)
    return can_pack


def keep_softcap(lm) -> None:
    """Let a model cap its attention scores if it should; transformers' default drops the cap."""
    if getattr(lm.config, "attn_logit_softcapping", None):
        lm.set_attn_implementation("eager")


def rope_types(config) -> set[str]:
    """How a model encodes positions; Gemma 3 has a rule for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    rules = [rule for rule in parameters.values() if isinstance(rule, dict)] or [parameters]
    return {rule.get("rope_type", "default") for rule in rules}
