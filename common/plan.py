"""Whether a run fits into memory: an estimate from the model's config, before weights are loaded.

`memory_plan` serves the plan that a run prints, --plan, which prints it and ends, the default of
--gpu-memory-utilization, and how many responses the engine computes at a time.
docs/performance.md holds its figures for models of 1.5 to 32 billion parameters.
"""

import dataclasses
import os

from common import data, terminal

GB = 1e9
CHUNK = 1024  # tokens to which the output layer is applied at a time (model.Policy)
CONTEXT = 1.5 * GB  # CUDA context, libraries and communication buffers of a process
ENGINE_WORKSPACE = 3 * GB  # the engine's activations and CUDA graphs
ENGINE_ASLEEP = 1.5 * GB  # what of that stays while the engine sleeps
USABLE = 0.95  # of the memory; the rest is lost to fragments


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank, and what they are for.

    On a machine without a GPU, the engine never sleeps, and `device` is the host memory per rank.
    """

    has_gpu: bool
    device: float  # memory of a rank's device
    host: float  # memory of the machine per rank
    resident: float  # weights and Adam's moments: always there
    training: float  # what comes on top while the trainer works
    engine_weights: float
    engine_workspace: float
    cache_per_token: float  # keys and values
    loading: float  # host memory while the weights are read
    longest: int  # prompt and response tokens

    @property
    def peak(self) -> float:
        """What a rank's device holds while the trainer works."""
        if self.has_gpu:
            return self.resident + self.training + CONTEXT + ENGINE_ASLEEP
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 1)) * 2**30  # vLLM's setting, in GiB
        return self.resident + self.training + self.engine_weights + cache

    @property
    def engine_free(self) -> float:
        """What the engine may take while it is awake, its cache included."""
        return max(0.0, USABLE * self.device - CONTEXT - self.resident)

    @property
    def utilization(self) -> float:
        """The engine's share of the GPU, the default of --gpu-memory-utilization."""
        return max(0.05, int(100 * self.engine_free / self.device) / 100)

    @property
    def cache_tokens(self) -> int:
        """How many tokens' keys and values the engine's cache holds."""
        cache = self.engine_free - self.engine_weights - self.engine_workspace
        return int(max(0.0, cache) / self.cache_per_token)

    @property
    def concurrent(self) -> int:
        """How many responses the engine should compute at a time, its --max-num-seqs.

        Responses are on average at half of their length, and most end before the longest. Beyond
        1024 nothing is gained. Without a GPU 256 was fastest.
        """
        if not self.has_gpu:
            return 256
        return min(1024, max(8, 2 * self.cache_tokens // self.longest))

    def problems(self) -> list[str]:
        """Sentences on what does not fit; none if everything does."""
        found = []
        if self.peak > USABLE * self.device:
            found.append(
                f"a rank needs {self.peak / GB:.1f} GB while the trainer works and has "
                f"{self.device / GB:.1f}: use more ranks, lower --tokens-per-microbatch, or choose "
                "a smaller model"
            )
        if self.has_gpu and self.cache_tokens < self.longest:
            found.append(
                f"the engine has room for {self.cache_tokens:,} tokens beside the trainer and "
                f"needs {self.longest:,} for one response: use more ranks or --tensor-parallel"
            )
        if self.loading > self.host:
            found.append(
                f"loading needs {self.loading / GB:.1f} GB of host memory per rank and there are "
                f"{self.host / GB:.1f}: use fewer ranks per machine"
            )
        return found

    def lines(self) -> list[str]:
        """The plan as text."""
        where = "GPU" if self.has_gpu else "host"
        text = [
            f"memory per rank, estimated: {self.resident / GB:.2f} GB for weights and Adam's "
            f"moments, {self.peak / GB:.2f} GB at the peak of training; the {where} has "
            f"{self.device / GB:.1f} GB; loading takes {self.loading / GB:.2f} GB of host memory",
        ]
        if self.has_gpu:
            text.append(
                f"the engine may take {self.utilization:.2f} of the GPU: a cache of "
                f"{self.cache_tokens:,} tokens, {self.concurrent} responses at a time"
            )
        return text + [f"this may not fit: {problem}" for problem in self.problems()]


def show(args, has_critic: bool) -> None:
    """What --plan does: print the plan on rank 0, without loading weights.

    Raises:
        SystemExit: with status 1 if something does not fit.
    """
    if int(os.environ.get("RANK", 0)):
        return
    config, _ = data.load_config_and_tokenizer(
        args.model, args.rope_theta, args.max_position_embeddings, args.trust_remote_code
    )
    data.check_context(config, args.max_prompt_tokens, args.max_response_tokens)
    plan = memory_plan(args, config, has_critic, args.plan)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    terminal.say(f"{args.method} on {args.model}, {ranks} rank{'s' * (ranks > 1)}")
    terminal.say("\n".join(plan.lines()))
    if plan.problems():
        raise SystemExit(1)
    terminal.say("this fits")


def memory_plan(args, config, has_critic: bool, gpu_gigabytes: float | None = None) -> MemoryPlan:
    """Estimate the memory of a training run. Ranks are torchrun's.

    Args:
        args: the flags of train_hpt.py.
        config: the model's Hugging Face config.
        has_critic: PPO trains a second network of the same size.
        gpu_gigabytes: memory of each GPU; this machine's, if there is one, by default.
    """
    import torch

    ranks = int(os.environ.get("WORLD_SIZE", 1)) // args.replicas  # that share the weights
    host = host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = host
    if gpu_gigabytes:
        device = gpu_gigabytes * GB
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).total_memory
    has_gpu = bool(gpu_gigabytes) or torch.cuda.is_available()
    number = 2 if has_gpu else 4  # bytes of a number in which trainer and engine compute

    total, block, outside = count_parameters(config, args.trust_remote_code)
    networks = 2 if has_critic else 1
    gathered = 2 * block + outside  # FSDP holds a block, fetches the next, and keeps the rest
    tokens = max(args.tokens_per_microbatch, args.max_prompt_tokens + args.max_response_tokens)
    config = config.get_text_config()  # of a model that also sees pictures
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    inside_a_block = tokens * (12 * width + 4 * inner) * number  # kept for its backward pass
    layers = config.num_hidden_layers
    if args.gradient_checkpointing:
        activations = layers * tokens * width * number + inside_a_block
    else:
        activations = layers * inside_a_block
    copies = 5 if args.entropy_coef else 3  # in float32: logits, exponentials, gradient, ...
    logits = copies * CHUNK * config.vocab_size * 4
    gradients = 4 * total / ranks
    gradients_of_a_block = (number + 4) * max(block, outside)  # before they are reduced

    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    return MemoryPlan(
        has_gpu=has_gpu,
        device=device,
        host=host,
        resident=networks * 12 * total / ranks,
        training=gradients + gathered * number + gradients_of_a_block + activations + logits,
        engine_weights=total * number / args.tensor_parallel,
        engine_workspace=ENGINE_WORKSPACE if has_gpu else 0.0,
        cache_per_token=2 * layers * kv_heads * head_dim * number / args.tensor_parallel,
        loading=total * number + 4 * block,  # one network after the other
        longest=args.max_prompt_tokens + args.max_response_tokens,
    )


def count_parameters(config, trust_remote_code: bool = False) -> tuple[int, int, int]:
    """(all, those of one block, those outside of the blocks) of a model, from its config alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # no memory for the parameters
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    total = sum(p.numel() for p in lm.parameters())
    blocks = [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or [])]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return total, max(sizes, default=0), total - sum(sizes)


def host_memory() -> float:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
