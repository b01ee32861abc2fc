"""The networks under FSDP: the policy and PPO's critic, how they are sharded, updated and saved."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from common import distributed


class Network(torch.nn.Module):
    """A Hugging Face model `lm`, and what the policy and the critic have in common."""

    name = "network"
    optimizer: torch.optim.Optimizer  # set by `shard`
    updates = 0  # optimizer steps that were taken, not skipped

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def states_before(self, ids: Tensor, response: Tensor) -> Tensor:
        """The last hidden states (M, D) at the positions just before the tokens in `response`.

        ids is (B, T) int64, padded on the right. Under causal attention no real token sees the
        padding, so there is no attention mask. response is (B, T) bool and marks the M tokens; it
        is never true in column 0.
        """
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        return hidden[:, :-1][response[:, 1:]]

    def num_parameters(self) -> int:
        """The number of parameters, over all shards."""
        return sum(p.numel() for p in self.parameters())

    def step(self, lr: float, max_norm: float) -> float:
        """Clip the gradient, take an optimizer step, clear the gradient. Returns its norm.

        If the norm is not finite, the optimizer step is skipped; the gradient is cleared anyway.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm).full_tensor().item()
        if math.isfinite(norm):
            self.optimizer.step()
            self.updates += 1
        elif distributed.rank() == 0:
            print(f"gradient norm of the {self.name} is {norm}: update skipped", flush=True)
        self.optimizer.zero_grad()
        return norm

    def check_finite(self, where: str) -> None:
        """Raise SystemExit if a weight is not a finite number; `where` says where it comes from.

        Each rank looks at its own shard, so every rank must call this.
        """
        found = None
        for name, parameter in self.lm.named_parameters():
            shard = parameter.detach()
            shard = shard.to_local() if hasattr(shard, "to_local") else shard
            if not shard.isfinite().all():
                found = name
                break
        everywhere = [None] * distributed.world_size()
        dist.all_gather_object(everywhere, found)
        names = [name for name in everywhere if name]
        if names:
            raise SystemExit(
                f"error: {where}: its weights are not finite numbers (nan or inf in {names[0]}): "
                "take a checkpoint that is whole"
            )

    def check_updated(self) -> None:
        """Raise SystemExit unless at least one optimizer step was taken, at the end of training."""
        if self.updates == 0:
            raise SystemExit(
                f"error: every optimizer step of the {self.name} was skipped, since its gradient "
                "was never finite: the model is unchanged, and is not saved as final/; look for "
                "nan in the metrics, or lower --lr"
            )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) pairs, in the dtype in which the sampler computes.

        The tensors are gathered from the shards one at a time: every rank must consume them all.
        Tied weights come under each of their names, as Sampler.load wants them.
        """
        for name, parameter in self.lm.named_parameters(remove_duplicate=False):
            dtype = torch.bfloat16 if parameter.is_cuda else torch.float32
            yield name, parameter.detach().full_tensor().to(dtype)

    def save(self, directory: Path, tokenizer, end_token_ids: list[int] | None = None) -> None:
        """Write a plain Hugging Face directory, with the weights as the sampler has them.

        end_token_ids: what ends a response, for generation_config.json; as it was if not given.
        """
        weights = {}
        for name, tensor in self.weights():  # every rank gathers, rank 0 keeps
            if distributed.rank() == 0:
                weights[name] = tensor.cpu()
        if distributed.rank() == 0:
            with torch.device("meta"):
                skeleton = type(self.lm)(self.lm.config).to(next(iter(weights.values())).dtype)
            if hasattr(self.lm, "generation_config"):  # a critic has none
                skeleton.generation_config = self.lm.generation_config
                if end_token_ids:
                    ids = end_token_ids if len(end_token_ids) > 1 else end_token_ids[0]
                    skeleton.generation_config.eos_token_id = ids
                    # Else transformers may take it for a copy of config.json, and make it anew.
                    if len(end_token_ids) > 1:
                        skeleton.generation_config._from_model_config = False
            skeleton.save_pretrained(directory, state_dict=weights)
            tokenizer.save_pretrained(directory)


class Policy(Network):
    """A causal language model that returns log-probabilities of given tokens.

    temperature: all logits are divided by it, as the sampler does. So every log-probability, also
    that of a demonstration, is one of softmax(logits / temperature).
    chunk: the output layer is applied to this many tokens at a time. A full (M, V) matrix of logits
    would take more memory than the rest of the model.
    """

    name = "policy"

    def __init__(self, lm, temperature: float, chunk: int = 1024):
        super().__init__(lm)
        self.temperature, self.chunk = temperature, chunk
        self.softcap = getattr(lm.config, "final_logit_softcapping", None)  # Gemma 2

    def forward(
        self, ids: Tensor, response: Tensor, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (M,) of the M tokens that `response` marks, and entropies or None.

        The M tokens come in the order of the rows, each row from left to right, without padding.
        entropies (M,), in nats, are those of the distributions from which the tokens come. Both
        are float32 or wider. ids and response are as in Network.states_before.
        """
        hidden, targets = self.states_before(ids, response), ids[response]  # (M, D), (M,)
        logp, entropy = [], []
        for states, tokens in zip(hidden.split(self.chunk), targets.split(self.chunk)):
            # checkpoint: the chunk's logits are computed again in the backward pass, not kept.
            part = checkpoint(self.head, states, tokens, with_entropy, use_reentrant=False)
            logp.append(part[0])
            entropy.append(part[1])
        return torch.cat(logp), torch.cat(entropy) if with_entropy else None

    def head(self, hidden: Tensor, targets: Tensor, with_entropy: bool):
        """(c,) log-probabilities and entropies from (c, D) states and (c,) token ids."""
        logits = self.lm.get_output_embeddings()(hidden)  # (c, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits / self.temperature
        logp = logits - logits.logsumexp(-1, keepdim=True)
        entropy = -(logp.exp() * logp).sum(-1) if with_entropy else None
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


class Critic(Network):
    """PPO's value model: the same base with a scalar head. `lm` is a ...ForTokenClassification."""

    name = "critic"

    def forward(self, ids: Tensor, response: Tensor) -> Tensor:
        """Values (M,) of the states before the M tokens in `response`; arguments as Policy's."""
        hidden = self.states_before(ids, response)  # (M, D)
        # In float32: bfloat16 has 3 digits, and advantages are often smaller than that error.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = self.lm.score.weight.to(wide), self.lm.score.bias.to(wide)
        return torch.nn.functional.linear(hidden.to(wide), weight, bias).squeeze(-1)


def safely(args) -> dict:
    """How weights are read: from .safetensors alone, without code that comes with the model."""
    return {
        "dtype": "auto",
        "use_safetensors": True,
        "trust_remote_code": args.trust_remote_code,
    }


def build_policy(args, config, device) -> Policy:
    """The policy from --model, sharded, with its optimizer."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(args.model, config=config, **safely(args))
    policy = shard(Policy(lm, args.temperature), args, device)
    policy.check_finite(f"--model {args.model}")
    return policy


def build_critic(args, config, device) -> Critic:
    """The critic from --critic, or the base model with a value head that is 0 everywhere."""
    from transformers import AutoModelForTokenClassification

    if args.critic:  # with its own config, which names the dtype in which it was saved
        lm = AutoModelForTokenClassification.from_pretrained(args.critic, **safely(args))
    else:
        one_value = {"num_labels": 1, "classifier_dropout": 0.0}
        config = type(config).from_dict(config.to_dict() | one_value)
        lm = AutoModelForTokenClassification.from_pretrained(
            args.model, config=config, **safely(args)
        )
        torch.nn.init.zeros_(lm.score.weight)
        torch.nn.init.zeros_(lm.score.bias)
    critic = shard(Critic(lm), args, device)
    critic.check_finite(f"--critic {args.critic}" if args.critic else f"--model {args.model}")
    return critic


def check_critic(config, directory: str | None = None) -> None:
    """Raise SystemExit with one sentence if no critic can be made.

    config: of the base model. transformers 5.19 has no value model for some families (Gemma 3).
    directory: the value of --critic, which must hold weights of a critic.
    """
    from safetensors import safe_open
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    from transformers.modeling_layers import GenericForTokenClassification

    if directory:
        files = Path(directory).glob("*.safetensors")
        names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118
        if "score.weight" not in names:
            raise SystemExit(
                f"error: --critic {directory}: its weights have no score.weight, so they are not a "
                "critic's; a run of --method ppo saves a critic in final/critic"
            )
    kind = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None or not issubclass(kind, GenericForTokenClassification):
        raise SystemExit(
            "error: --method ppo needs a critic, and transformers has no token classification "
            f"model for {config.model_type} to make one of: use another method, or another model"
        )


def shard(network: Network, args, device) -> Network:
    """Shard a network over the ranks with FSDP, block by block, and give it its AdamW optimizer.

    With --replicas R (HSDP), each R-th of the ranks, in their order, holds the whole network. If R
    is the number of machines, weights are gathered inside a machine, and only gradients leave it.
    The master weights are float32. On a GPU the network computes in bfloat16 and sums gradients in
    float32; on a CPU all is float32.
    """
    lm = network.lm.train()  # without train(), transformers ignores gradient checkpointing
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cuda":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    else:
        precision = MixedPrecisionPolicy()
    world, replicas = dist.get_world_size(), args.replicas
    if world % replicas:
        raise SystemExit(f"error: --replicas {replicas} must divide the number of ranks, {world}")
    shape, names = (replicas, world // replicas), ("replicate", "shard")
    if replicas == 1:
        shape, names = (world,), ("shard",)
    mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
    blocks = [m for m in lm.modules() if type(m).__name__ in lm._no_split_modules]
    for block in blocks:
        fully_shard(block.float(), mesh=mesh, mp_policy=precision)
    fully_shard(network.float(), mesh=mesh, mp_policy=precision)
    network.optimizer = build_optimizer(network, args)
    return network


def build_optimizer(network: Network, args) -> torch.optim.Optimizer:
    """AdamW as the paper's authors have it. `Network.step` sets the learning rate."""
    return torch.optim.AdamW(
        network.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay
    )
