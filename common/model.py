"""A model's files; the policy and PPO's critic under FSDP, how they are updated and saved."""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from common import attention, distributed, head, report

MOST_SKIPPED = 20


# --------------------------------------------------------------------------------- a model's files


def load_config_and_tokenizer(args) -> tuple:
    """(Hugging Face config with the overrides applied, tokenizer) of --model."""
    from transformers import AutoConfig, AutoTokenizer

    where = f"error: --model {args.model}"
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except Exception as error:  # of many kinds, since every file of the model may be broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(
            f"{where} cannot be loaded, from here or from the hub: {reason}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"{where}: its tokenizer has no end-of-sequence token")
    if args.template == "chat" and not tokenizer.chat_template:
        raise SystemExit(f"{where}: its tokenizer has no chat template: use --template plain")
    if Path(args.model).is_dir():
        check_weight_files(Path(args.model), where)
    return override(config, args.rope_theta, args.max_position_embeddings), tokenizer


def check_weight_files(folder: Path, where: str) -> None:
    """End the program unless transformers and vLLM read the same weights from a model's directory.

    transformers reads model.safetensors, or else the files of the index. vLLM reads the files of
    the index, or else every .safetensors file.
    """
    files = {path.name for path in folder.glob("*.safetensors")}
    if not files:
        raise SystemExit(f"{where}: no .safetensors file there, and pickled weights are not read")
    index = folder / "model.safetensors.index.json"
    strays = files - {"model.safetensors"}
    if index.exists():
        named = set(dict(read_json(index, where).get("weight_map") or {}).values())
        strays = {"model.safetensors"} & files - named
    if strays:
        raise SystemExit(
            f"{where}: vLLM and transformers would read different weights: take away "
            f"{', '.join(sorted(strays))}, or else the other files of weights"
        )


def read_json(path: Path, where: str) -> dict:
    """The object in a .json file of a model; SystemExit: it is broken."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{where}: {path.name} cannot be read: {error}") from error


def end_token_ids(model: str, config, tokenizer) -> list[int]:
    """Every token that ends a response, the tokenizer's end-of-sequence token first.

    The tokenizer, the config and the generation config of a model each name some, and they differ
    where a chat model was made of a base model. The sampler stops at all of them, and a model that
    was trained is saved with all of them: else it would not know its own end.
    """
    from transformers.utils import cached_file

    named = [getattr(c, "eos_token_id", None) for c in (config, config.get_text_config())]
    # Not every model has this file, and transformers refuses to read some.
    file = cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if file:
        named.append(read_json(Path(file), f"error: --model {model}").get("eos_token_id"))
    ids = [tokenizer.eos_token_id]
    for value in named:
        for token in value if isinstance(value, list | tuple) else [value]:
            # Some configs name a token outside the vocabulary, which can never be sampled.
            is_token = isinstance(token, int) and 0 <= token < config.get_text_config().vocab_size
            if is_token and token not in ids:
                ids.append(token)
    return ids


def override(config, rope_theta: float | None = None, max_position_embeddings: int | None = None):
    """Change a Hugging Face config in place and return it.

    The trainer and the sampler both call this on the config that they read. It also switches
    dropout off: the sampler has none, and the trainer must compute the same probabilities.
    """
    config.output_attentions = config.output_hidden_states = False  # nobody reads them
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    # vLLM also calls this on a bare PreTrainedConfig, which has no rope_parameters.
    if rope_theta is not None and hasattr(config, "rope_parameters"):
        if "rope_theta" not in config.rope_parameters:  # Gemma 3 has one per kind of layer
            raise SystemExit(f"error: --rope-theta: {config.model_type} has no single rope_theta")
        config.rope_parameters = config.rope_parameters | {"rope_theta": rope_theta}
    return config


def overrides_of(args):
    """`override` with the flags' values, a function config -> config, for the sampler."""
    positions = args.max_position_embeddings
    return functools.partial(
        override, rope_theta=args.rope_theta, max_position_embeddings=positions
    )


def check_context(config, prompt_tokens: int, max_response_tokens: int) -> None:
    """End the program unless a prompt and a response together fit the model's positions."""
    needed = prompt_tokens + max_response_tokens
    positions = getattr(config, "max_position_embeddings", math.inf)
    if needed > positions:
        raise SystemExit(
            f"error: prompts of up to {prompt_tokens} tokens and --max-response-tokens "
            f"{max_response_tokens} need {needed} positions, the model has {positions}: lower the "
            "latter, or raise the model's with --max-position-embeddings (and --rope-theta)"
        )


# ------------------------------------------------------------------------------------- the networks


class Network(torch.nn.Module):
    """A Hugging Face model `lm`, and what the policy and the critic have in common."""

    name = "network"
    optimizer: torch.optim.Optimizer  # set by `shard`
    skipped = 0  # optimizer steps in a row, until now

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.can_pack = attention.use_packed(lm)  # else a micro-batch must be a single sequence

    def states_before(self, ids: Tensor, is_response: Tensor, lengths: list[int]) -> Tensor:
        """The last hidden states (M, D) at the positions just before the response tokens.

        Args:
            ids: (T,) int64, sequences of the given lengths, one after the other.
            is_response: (T,) bool, true at the M response tokens, never at the first of a sequence.
            lengths: tokens of each sequence; they add up to T.
        """
        positions = torch.cat([torch.arange(n) for n in lengths]).to(ids.device)  # (T,)
        packing = {attention.LENGTHS: attention.Lengths(lengths)} if self.can_pack else {}
        states = self.lm.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, **packing
        ).last_hidden_state[0]  # (T, D)
        return states[:-1][is_response[1:]]

    def num_parameters(self) -> int:
        """The number of parameters, over all shards."""
        return sum(p.numel() for p in self.parameters())

    def step(self, lr: float, max_norm: float) -> float:
        """Clip the gradient, take an optimizer step, clear the gradient. Returns its norm.

        Without any backward pass the gradient is 0; AdamW still takes the step that its averages of
        earlier gradients and its weight decay give. If the norm is not finite, the optimizer step
        is skipped; the gradient is cleared anyway.

        Raises:
            SystemExit: more than MOST_SKIPPED optimizer steps in a row were skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.reshard()  # a pass without a backward pass leaves the root's weights gathered
        for parameter in self.parameters():
            if parameter.grad is None:  # no sequence of the mini-batch has a signal
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm).full_tensor().item()
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == 0:
            self.optimizer.step()
        elif distributed.rank() == 0:
            report.say(f"the gradient norm of the {self.name} is {norm}: update skipped")
        if self.skipped > MOST_SKIPPED:
            raise SystemExit(
                f"error: {self.skipped} updates in a row were skipped: go on from the last "
                "checkpoint with a lower --lr"
            )
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) pairs, in the dtype in which the sampler computes.

        The tensors are gathered from the shards one at a time: every rank must consume them all.
        Tied weights come under each of their names, as Sampler.load wants them.
        """
        for name, parameter in self.lm.named_parameters(remove_duplicate=False):
            device = parameter.device_mesh.device_type  # with --offload, the parameter is not there
            # On a GPU half the bytes are gathered.
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            yield name, parameter.detach().to(device, dtype).full_tensor()

    def save(self, directory: Path, tokenizer, end_token_ids: list[int]) -> None:
        """Write a plain Hugging Face directory, with the weights as the sampler has them.

        end_token_ids: what ends a response, for generation_config.json.

        Raises:
            SystemExit: a weight is infinite or nan; nothing is written.
        """
        weights = {}
        stored = {name for name, _ in self.lm.named_parameters()}  # tied weights have one name here
        for name, tensor in self.weights():  # every rank gathers, rank 0 keeps
            if not tensor.isfinite().all():
                raise SystemExit(
                    f"error: {name} of the {self.name} is infinite or nan, and is not saved: go on "
                    "from the last checkpoint with a lower --lr"
                )
            if distributed.rank() == 0 and name in stored:
                weights[name] = tensor.cpu()
        if distributed.rank() == 0:
            self.write(directory, tokenizer, end_token_ids, weights)

    def write(self, directory: Path, tokenizer, end_token_ids: list[int], weights: dict) -> None:
        """Write a Hugging Face directory with these weights, {name: tensor}; {} is a trial.

        Of generation_config.json only the special tokens stay: transformers reads, but refuses to
        write, much that bases have there, as a temperature without do_sample.
        """
        from transformers import GenerationConfig

        dtype = next((tensor.dtype for tensor in weights.values()), torch.float32)
        with torch.device("meta"):
            skeleton = type(self.lm)(self.lm.config).to(dtype)
        if hasattr(self.lm, "generation_config"):  # a critic has none
            skeleton.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=end_token_ids if len(end_token_ids) > 1 else end_token_ids[0],
                pad_token_id=tokenizer.pad_token_id,
            )
        skeleton.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)


class Policy(Network):
    """A causal language model that returns log-probabilities of given tokens.

    temperature: all logits are divided by it, as the sampler does. So every log-probability, also
    that of a demonstration, is one of softmax(logits / temperature).
    """

    name = "policy"

    def __init__(self, lm, temperature: float):
        super().__init__(lm)
        self.temperature = temperature

    def forward(
        self, ids: Tensor, is_response: Tensor, lengths: list[int], with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (M,) of the response tokens, and entropies (M,) or None.

        Entropies, in nats, are those of the distributions from which the tokens come. Both are
        float32 or wider. The arguments are those of Network.states_before.
        """
        hidden = self.states_before(ids, is_response, lengths)  # (M, D)
        return head.token_log_probs(
            self.lm, hidden, ids[is_response], self.temperature, with_entropy
        )


class Critic(Network):
    """PPO's value model: the same base with a scalar head. `lm` is a ...ForTokenClassification."""

    name = "critic"

    def forward(self, ids: Tensor, is_response: Tensor, lengths: list[int]) -> Tensor:
        """Values (M,) of the states before the response tokens; arguments as Policy's."""
        hidden = self.states_before(ids, is_response, lengths)  # (M, D)
        # In float32: bfloat16 has 3 digits, and advantages are often smaller than that error.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = self.lm.score.weight.to(wide), self.lm.score.bias.to(wide)
        return torch.nn.functional.linear(hidden.to(wide), weight, bias).squeeze(-1)


# Weights are read from .safetensors alone, without pickles and code that come with a model.
SAFELY = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}


def build_policy(args, config, device, checkpointing: bool) -> Policy:
    """The policy from --model, sharded, with its optimizer. checkpointing: as `shard` has it."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    # The base's own generation_config.json is not read: transformers refuses some of its values.
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            args.model, config=config, generation_config=GenerationConfig(), **SAFELY
        )
    except Exception as error:  # every value and file may be wrong
        raise SystemExit(f"error: --model {args.model} cannot be built: {error}") from error
    return shard(Policy(lm, args.temperature), args, device, checkpointing)


def build_critic(args, config, device, checkpointing: bool) -> Critic:
    """The critic: the base model with a value head that is 0 everywhere."""
    from transformers import AutoModelForTokenClassification

    config = type(config).from_dict(config.to_dict() | {"num_labels": 1, "classifier_dropout": 0.0})
    lm = AutoModelForTokenClassification.from_pretrained(args.model, config=config, **SAFELY)
    torch.nn.init.zeros_(lm.score.weight)
    torch.nn.init.zeros_(lm.score.bias)
    return shard(Critic(lm), args, device, checkpointing)


def shard(network: Network, args, device, checkpointing: bool) -> Network:
    """Shard a network over the ranks with FSDP, block by block, and give it its AdamW optimizer.

    The master weights are float32. On a GPU the network computes in bfloat16 and sums gradients in
    float32; on a CPU all is float32. `Network.step` sets the learning rate.

    Args:
        checkpointing: compute the activations of a block again in the backward pass, instead of
            keeping them.
    """
    on_gpu = device.type == "cuda"
    lm = network.lm.train()  # without train(), transformers ignores gradient checkpointing
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {"mesh": dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))}
    if on_gpu:
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if args.offload:  # master weights, gradients and moments stay on the host, and so AdamW's step
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=on_gpu)
    blocks = [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or [])]
    if on_gpu and args.compile and network.can_pack:
        compile_blocks(blocks)
    for block in blocks:
        fully_shard(block.float(), **settings)
    fully_shard(network.float(), **settings)
    network.optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=args.lr,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
        fused=on_gpu,  # one kernel for all parameters
    )
    return network


def compile_blocks(blocks: list, **settings) -> None:
    """Let torch.compile fuse what a block computes around its attention; settings are its own.

    One set of graphs serves all blocks and all numbers of tokens, if sequences are packed: other
    models are not compiled. It comes before FSDP, which must gather a block's weights before the
    compiled function runs.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True, **settings)
