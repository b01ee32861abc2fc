"""The networks under FSDP: the policy and PPO's critic, how they are sharded, updated and saved."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from common import attention, distributed, terminal


class Network(torch.nn.Module):
    """A Hugging Face model `lm`, and what the policy and the critic have in common."""

    name = "network"
    optimizer: torch.optim.Optimizer  # set by `shard`
    replicas = 1  # how many ranks hold the same shard; set by `shard`
    updates = 0  # optimizer steps that were taken, not skipped
    skipped_in_a_row = 0  # optimizer steps that were skipped since the last one that was taken

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.can_pack = attention.use_packed(lm)  # else a micro-batch must be a single sequence

    def states_before(self, ids: Tensor, response: Tensor, lengths: list[int]) -> Tensor:
        """The last hidden states (M, D) at the positions just before the tokens in `response`.

        ids is (1, T) int64: sequences of the given lengths, one after the other. response is (1, T)
        bool and marks the M tokens; it is never true at the first token of a sequence.
        """
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)  # (1, T)
        packing = {attention.LENGTHS: lengths} if self.can_pack else {}
        states = self.lm.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, **packing
        ).last_hidden_state  # (1, T, D)
        return states[:, :-1][response[:, 1:]]

    def num_parameters(self) -> int:
        """The number of parameters, over all shards."""
        return sum(p.numel() for p in self.parameters())

    def step(self, lr: float, max_norm: float) -> float:
        """Clip the gradient, take an optimizer step, clear the gradient. Returns its norm.

        Without any backward pass the gradient is 0; AdamW then takes the step that its averages of
        earlier gradients and its weight decay give. If the norm is not finite, the optimizer step
        is skipped; the gradient is cleared anyway.

        Raises:
            SystemExit: the step has made a weight or a moment infinite or nan.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.reshard()  # a pass without a backward pass leaves the root's weights gathered
        for parameter in self.parameters():
            if parameter.grad is None:  # no sequence of the mini-batch has a signal
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm).full_tensor().item()
        if math.isfinite(norm):
            self.optimizer.step()
            self.updates += 1
            self.skipped_in_a_row = 0
            if name := self.not_finite():
                raise SystemExit(
                    f"error: optimizer step {self.updates} of the {self.name} made {name} infinite "
                    "or nan; nothing of it is saved: start a new run from the last checkpoint, "
                    "with a lower --lr"
                )
        else:
            self.skipped_in_a_row += 1
            if distributed.rank() == 0:
                terminal.say(f"gradient norm of the {self.name} is {norm}: update skipped")
        self.optimizer.zero_grad()
        return norm

    def not_finite(self) -> str | None:
        """The name of a weight that is not finite, or that has such a moment; None without any.

        Each rank looks at its own shards, so every rank must call this.
        """
        names, finite = [], []
        for name, parameter in self.named_parameters():
            for tensor in [parameter.detach(), *self.optimizer.state.get(parameter, {}).values()]:
                shard = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                names.append(name)
                finite.append(shard.isfinite().all().to(parameter.device))
        flags = torch.stack(finite).int()
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MIN)
        return None if flags.all() else names[int(flags.argmin())]

    def check_finite(self, where: str) -> None:
        """Raise SystemExit if a weight is not a finite number; `where` says where it comes from.

        Every rank must call this.
        """
        if name := self.not_finite():
            raise SystemExit(
                f"error: {where}: its weights are not finite numbers (nan or inf in {name}): "
                "take a checkpoint that is whole"
            )

    def check_skipped(self, most: int) -> None:
        """Raise SystemExit if more than `most` optimizer steps in a row were skipped."""
        if self.skipped_in_a_row > most:
            raise SystemExit(
                f"error: the last {self.skipped_in_a_row} optimizer steps of the {self.name} were "
                "skipped, since the gradient was not finite, more than --max-skipped; "
                "skipped.jsonl holds what they trained on: look there, or start a new run from the "
                "last checkpoint with a lower --lr"
            )

    def counters(self) -> dict[str, int]:
        """What a checkpoint keeps besides tensors."""
        return {"updates": self.updates, "skipped_in_a_row": self.skipped_in_a_row}

    def set_counters(self, counters: dict[str, int]) -> None:
        """Go on counting from what `counters` returned."""
        self.updates, self.skipped_in_a_row = counters["updates"], counters["skipped_in_a_row"]

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
            # Cast before gathering, which then moves half the bytes.
            yield name, parameter.detach().to(dtype).full_tensor()

    def save(self, directory: Path, tokenizer, end_token_ids: list[int] | None = None) -> None:
        """Write a plain Hugging Face directory, with the weights as the sampler has them.

        end_token_ids: what ends a response, for generation_config.json; as it was if not given.
        """
        weights = {}
        stored = {name for name, _ in self.lm.named_parameters()}  # tied weights have one name here
        for name, tensor in self.weights():  # every rank gathers, rank 0 keeps
            if distributed.rank() == 0 and name in stored:
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

    def forward(
        self, ids: Tensor, response: Tensor, lengths: list[int], with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (M,) of the M tokens that `response` marks, and entropies or None.

        entropies (M,), in nats, are those of the distributions from which the tokens come. Both
        are float32 or wider. ids, response and lengths are as in Network.states_before.
        """
        hidden = self.states_before(ids, response, lengths)  # (M, D)
        targets = ids[response]  # (M,)
        logp, entropy = [], []
        for states, tokens in zip(hidden.split(self.chunk), targets.split(self.chunk)):
            # checkpoint: the chunk's logits are computed again in the backward pass, not kept.
            part = checkpoint(self.of_chunk, states, tokens, with_entropy, use_reentrant=False)
            logp.append(part[0])
            entropy.append(part[1])
        return torch.cat(logp), torch.cat(entropy) if with_entropy else None

    def of_chunk(self, hidden: Tensor, targets: Tensor, with_entropy: bool):
        """(c,) log-probabilities, and entropies or None, from (c, D) states and (c,) token ids."""
        all_logp = tempered_logits(self.lm, hidden, self.temperature).log_softmax(-1)  # (c, V)
        logp = all_logp.gather(-1, targets[:, None]).squeeze(-1)
        entropy = -(all_logp.exp() * all_logp).sum(-1) if with_entropy else None
        return logp, entropy


def tempered_logits(lm, hidden: Tensor, temperature: float) -> Tensor:
    """The logits (c, V) of states (c, D), divided by the temperature, in float32 or wider."""
    logits = wide_logits(lm.get_output_embeddings(), hidden)
    if (scale := logit_scale(lm.config)) != 1.0:
        logits = logits * scale
    if softcap := getattr(lm.config, "final_logit_softcapping", None):  # Gemma 2
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1.0 else logits / temperature


def logit_scale(config) -> float:
    """The factor of the output layer's result: 1, except in Cohere, Granite and a few others.

    transformers multiplies by it outside of the output layer; configs have several names for it.
    """
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None):
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scaling if config.model_type.startswith("hyperclovax") else 1 / scaling


def wide_logits(output_layer: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """The output layer's logits (c, V) of states (c, D), in float32 or wider.

    On a GPU the operands are bfloat16, but the products are not rounded to bfloat16, which has 3
    digits: the sampler does the same (`rollout.prepare_config`), so that both agree.
    """
    if hidden.dtype != torch.bfloat16:
        logits = output_layer(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = WideProduct.apply(hidden, output_layer.weight)
    return logits if output_layer.bias is None else logits + output_layer.bias.float()


class WideProduct(torch.autograd.Function):
    """x @ w.T in float32 for bfloat16 x (c, D) and w (V, D).

    torch has no derivative for a product whose result is wider than its operands. This one rounds
    the gradient of the result to bfloat16, as the gradient of a bfloat16 layer is.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        """x @ w.T."""
        ctx.save_for_backward(x, w)
        if x.is_cuda:
            return torch.mm(x, w.T, out_dtype=torch.float32)
        return x.float() @ w.float().T  # products of two bfloat16 numbers are exact in float32

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and w from that of the result."""
        x, w = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ w, grad.T @ x


class Critic(Network):
    """PPO's value model: the same base with a scalar head. `lm` is a ...ForTokenClassification."""

    name = "critic"

    def forward(self, ids: Tensor, response: Tensor, lengths: list[int]) -> Tensor:
        """Values (M,) of the states before the M tokens in `response`; arguments as Policy's."""
        hidden = self.states_before(ids, response, lengths)  # (M, D)
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

    lm, loading = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, output_loading_info=True, **safely(args)
    )
    check_none_made_up(lm, set(loading["missing_keys"]), f"--model {args.model}")
    policy = shard(Policy(lm, args.temperature), args, device)
    policy.check_finite(f"--model {args.model}")
    return policy


def check_none_made_up(lm, missing: set[str], where: str) -> None:
    """Raise SystemExit if a weight was not in the files, so that transformers has made it up.

    missing: names that were not there. A tied weight may be there under its other name.
    """
    parameters = list(lm.named_parameters(remove_duplicate=False))
    there = {id(parameter) for name, parameter in parameters if name not in missing}
    made_up = [name for name, parameter in parameters if id(parameter) not in there]
    if made_up:
        raise SystemExit(
            f"error: {where}: the weights have no {made_up[0]}: take a checkpoint that is whole"
        )


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

    With --replicas R (HSDP), the ranks form R groups of neighbours, each with a whole network. If R
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
    network.replicas = replicas
    shape, names = (replicas, world // replicas), ("replicate", "shard")
    if replicas == 1:
        shape, names = (world,), ("shard",)
    mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
    blocks = [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or [])]
    for block in blocks:
        fully_shard(block.float(), mesh=mesh, mp_policy=precision)
    fully_shard(network.float(), mesh=mesh, mp_policy=precision)
    network.optimizer = build_optimizer(network, args)
    return network


def build_optimizer(network: Network, args) -> torch.optim.Optimizer:
    """AdamW as the paper's authors have it. `Network.step` sets the learning rate."""
    return torch.optim.AdamW(
        network.parameters(),
        lr=args.lr,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
        fused=torch.cuda.is_available(),  # one kernel for all parameters
    )
