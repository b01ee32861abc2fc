"""The networks under FSDP: the policy, PPO's critic, how both are sharded, gathered and saved. No algorithm here."""
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


class Policy(torch.nn.Module):
    """A causal LM whose forward pass gives log-probabilities of chosen tokens, never all logits at once."""

    def __init__(self, lm, temperature, chunk=1024):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        self.softcap = getattr(lm.config, "final_logit_softcapping", None)  # Gemma 2

    def forward(self, ids, response, with_entropy=False):
        """Log-probabilities (n,), float32 or wider, of the n tokens marked in `response`, row by row, and their entropy or None.

        ids (B, T) int64, padded on the right; under causal attention no real token sees the padding, so there is no
        attention mask. response (B, T) bool, never True in column 0.
        """
        hidden, targets = states_before(self.lm.base_model, ids, response), ids[response]  # (n, D), (n,)
        parts = [checkpoint(self.head, h, t, with_entropy, use_reentrant=False)
                 for h, t in zip(hidden.split(self.chunk), targets.split(self.chunk))]
        logp, entropy = zip(*parts)
        return torch.cat(logp), torch.cat(entropy) if with_entropy else None

    def head(self, hidden, targets, with_entropy):
        """(c, D) states and (c,) token ids to (c,) log-probabilities and entropies; recomputed in the backward pass."""
        logits = self.lm.get_output_embeddings()(hidden)  # (c, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits / self.temperature
        logp = logits - logits.logsumexp(-1, keepdim=True)
        entropy = -(logp.exp() * logp).sum(-1) if with_entropy else None
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


class Critic(torch.nn.Module):
    """PPO's value model: the same base with a scalar head, V(s_t) of the state before token t."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm  # of Hugging Face's ...ForTokenClassification, one label

    def forward(self, ids, response):
        """Values (n,), float32 or wider, of the states before the n tokens marked in `response`; arguments as Policy's."""
        hidden = states_before(self.lm.base_model, ids, response)  # (n, D)
        wide = torch.promote_types(hidden.dtype, torch.float32)  # a bfloat16 value would be off by more than many advantages
        return torch.nn.functional.linear(hidden.to(wide), self.lm.score.weight.to(wide), self.lm.score.bias.to(wide)).squeeze(-1)


def states_before(backbone, ids, response):
    """(n, D) last hidden states at the positions before those marked in `response` (B, T)."""
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return hidden[:, :-1][response[:, 1:]]


def build_policy(args, config, device):
    """The sharded policy, from --model."""
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype="auto")
    return shard(Policy(lm, args.temperature), args.gradient_checkpointing, device)


def check_critic(config, directory=None):
    """SystemExit with one sentence where transformers has no value model of the base's family (Gemma 3, in 5.19), or where
    `directory`, of --critic, holds none."""
    from safetensors import safe_open
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    from transformers.modeling_layers import GenericForTokenClassification
    if directory and not any("score.weight" in safe_open(file, "pt").keys() for file in Path(directory).glob("*.safetensors")):
        raise SystemExit(f"error: --critic {directory}: no critic there, its weights have no score.weight; a run of --method ppo "
                         "saves one in final/critic")
    kind = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None or not issubclass(kind, GenericForTokenClassification):  # others name their head otherwise
        raise SystemExit(f"error: --method ppo needs a critic, and transformers has no {config.model_type} model for token "
                         "classification to make one of: use another method, or another model")


def build_critic(args, config, device):
    """The sharded critic: --critic, as a run saved it, or the base of --model with a head that says 0."""
    from transformers import AutoModelForTokenClassification
    if args.critic:  # its own config, not the base's: that names the dtype in which it was saved
        lm = AutoModelForTokenClassification.from_pretrained(args.critic, dtype="auto")
    else:
        config = type(config).from_dict(config.to_dict() | {"num_labels": 1, "classifier_dropout": 0.0})
        lm = AutoModelForTokenClassification.from_pretrained(args.model, config=config, dtype="auto")
        torch.nn.init.zeros_(lm.score.weight)
        torch.nn.init.zeros_(lm.score.bias)
    return shard(Critic(lm), args.gradient_checkpointing, device)


def shard(module, gradient_checkpointing, device):
    """FSDP over all ranks, a block at a time: float32 master weights; on a GPU, bfloat16 compute, float32 reduction."""
    lm = module.lm.train()  # without this, HF ignores gradient checkpointing; dropout is off in the config
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [m for m in lm.modules() if type(m).__name__ in lm._no_split_modules]:
        fully_shard(block.float(), mesh=mesh, mp_policy=precision)
    return fully_shard(module.float(), mesh=mesh, mp_policy=precision)


def full_weights(module, dtype):
    """(Hugging Face name, full tensor) pairs, gathered from the shards one at a time; every rank must consume them.

    Tied weights come under each of their names, as rollout.load wants them.
    """
    for name, parameter in module.lm.named_parameters(remove_duplicate=False):
        yield name, parameter.detach().full_tensor().to(dtype)


def save(module, tokenizer, directory, device):
    """A plain Hugging Face directory: float32 from a CPU, bfloat16 from a GPU, as the sampler held it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {}
    for name, tensor in full_weights(module, dtype):  # every rank gathers, one keeps
        if dist.get_rank() == 0:
            weights[name] = tensor.cpu()
    if dist.get_rank() == 0:
        with torch.device("meta"):
            skeleton = type(module.lm)(module.lm.config).to(dtype)
        if hasattr(module.lm, "generation_config"):  # a critic has none
            skeleton.generation_config = module.lm.generation_config
        skeleton.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)
