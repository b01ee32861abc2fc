"""Whether a run fits into memory: an estimate from the model's config, before weights are loaded.

It serves the plan that a run prints, --plan, which prints it and ends, the default of
--gpu-memory-utilization, how many responses the engine computes at a time, and whether the trainer
checkpoints gradients. docs/gpu.md holds its figures for models of 1.5 to 32 billion parameters.
"""

import dataclasses
import math
import os

import torch

from common import model
from common.head import CHUNK

GB = 1e9
CONTEXT = 1.5 * GB  # CUDA context, libraries and communication buffers of a process
ENGINE_TOKENS = 8192  # per pass of the engine, or one longest sequence; vLLM's default is higher
ENGINE_RESPONSES = 512  # at a time: for a larger batch vLLM has no CUDA graph
ENGINE_GRAPHS = 1 * GB  # the engine's CUDA graphs
ENGINE_ASLEEP = 1.5 * GB  # what stays while the engine sleeps
USABLE = 0.95  # of the memory; the rest is lost to fragments


@dataclasses.dataclass
class MemoryPlan:
    """Bytes per rank, and what they are for; without a GPU, `device` is the host's memory."""

    has_gpu: bool
    device: float  # memory of a rank's device
    resident: float  # weights and Adam's moments: always there
    offloaded: float  # what --offload keeps in the host's memory
    host: float  # a rank's share of this host's memory; inf for the GPUs of --plan GB
    peak: float  # what a rank's device holds while the trainer works
    checkpointing: bool  # whether the trainer checkpoints gradients
    utilization: float  # the engine's share of the GPU: --gpu-memory-utilization, or what is free
    cache_tokens: int  # whose keys and values the engine's cache holds beside the trainer
    concurrent: int  # how many responses the engine should compute at a time
    longest: int  # prompt and response tokens

    def lines(self) -> list[str]:
        """The plan as text; what may not fit stands at its end."""
        where = "GPU" if self.has_gpu else "host"
        text = [
            f"memory per rank, estimated: {self.resident / GB:.2f} GB for weights and Adam's "
            f"moments, {self.peak / GB:.2f} GB at the peak of training with"
            f"{'' if self.checkpointing else 'out'} gradient checkpointing; the {where} has "
            f"{self.device / GB:.1f} GB"
        ]
        if self.offloaded:
            text.append(
                f"the host holds {self.offloaded / GB:.1f} GB per rank of weights, moments and "
                "gradients"
            )
        if self.has_gpu:
            text.append(
                f"the engine may take {self.utilization:.2f} of the GPU: a cache of "
                f"{self.cache_tokens:,} tokens, {self.concurrent} responses at a time"
            )
        return text + [f"this may not fit: {problem}" for problem in self.problems()]

    def problems(self) -> list[str]:
        """Sentences on what does not fit; none if everything does."""
        found = []
        if self.peak > USABLE * self.device:
            found.append(
                "the peak of training is above the memory: use more ranks, --offload or a lower "
                "--tokens-per-microbatch, or choose a smaller model"
            )
        if self.offloaded > USABLE * self.host:
            found.append(
                f"the host has {self.host / GB:.1f} GB per rank, too little for --offload: use "
                "more machines, or choose a smaller model"
            )
        if self.has_gpu and self.utilization * self.device + self.resident + CONTEXT > self.device:
            found.append(
                f"the engine's {self.utilization:.2f} of the GPU leaves too little for weights and "
                "moments: lower --gpu-memory-utilization"
            )
        if self.has_gpu and self.cache_tokens < self.longest:
            found.append(
                f"the engine's cache is too small for a response of {self.longest:,} tokens: use "
                "more ranks or --tensor-parallel"
            )
        return found


def show(args, has_critic: bool) -> None:
    """What --plan does: print the plan on rank 0, without loading weights.

    Raises:
        SystemExit: with status 1 if something does not fit.
    """
    config, _ = model.load_config_and_tokenizer(args)
    plan = memory_plan(args, config, has_critic, args.plan)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join([*plan.lines(), *(["this fits"] if not plan.problems() else [])]))
    if plan.problems():
        raise SystemExit(1)


def memory_plan(args, config, has_critic: bool, gpu_gigabytes: float | None = None) -> MemoryPlan:
    """Estimate the memory of a training run. Ranks are torchrun's.

    Args:
        args: the flags of train_hpt.py.
        config: the model's Hugging Face config.
        has_critic: PPO trains a second network of the same size.
        gpu_gigabytes: memory of each GPU; this machine's, if there is one, by default.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    has_gpu = bool(gpu_gigabytes) or torch.cuda.is_available()
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpu_gigabytes:
        device, host = gpu_gigabytes * GB, math.inf
    else:
        device = torch.cuda.get_device_properties(0).total_memory if has_gpu else host
    number = 2 if has_gpu else 4  # bytes of a number in which trainer and engine compute
    longest = args.max_prompt_tokens + args.max_response_tokens

    total, block, outside = count_parameters(config)
    networks = 2 if has_critic else 1
    resident, offloaded = networks * 12 * total / ranks, 0.0
    gradients = 4 * total / ranks  # the critic's come after the policy's are cleared
    if args.offload and has_gpu:
        offloaded = resident + gradients
        resident = gradients = 0.0
    text = config.get_text_config()  # of a model that also sees pictures
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache_per_token = 2 * text.num_hidden_layers * kv_heads * head_dim * number
    weights = total * number / args.tensor_parallel

    if has_gpu:
        beside = CONTEXT + ENGINE_ASLEEP
        free = max(0.0, USABLE * device - CONTEXT - resident)  # for the engine while it is awake
        utilization = args.gpu_memory_utilization or max(0.05, int(100 * free / device) / 100)
        if args.gpu_memory_utilization:
            free = utilization * device
        cache = max(0.0, free - weights - engine_workspace(text, longest))
        cache_tokens = int(cache * args.tensor_parallel / cache_per_token)
        # Responses are on average at half of their length.
        concurrent = min(ENGINE_RESPONSES, max(8, 2 * cache_tokens // longest))
    else:  # the engine never sleeps; VLLM_CPU_KVCACHE_SPACE is vLLM's setting, in GiB
        beside = weights + float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 1)) * 2**30
        utilization, cache_tokens, concurrent = 0.05, 0, 256  # 256 was fastest

    def peak_of(checkpointing: bool) -> float:
        """What a rank's device holds while the trainer works."""
        training = training_bytes(args, text, block, outside, number, checkpointing)
        return resident + gradients + training + beside

    checkpointing = args.gradient_checkpointing == "on"
    if args.gradient_checkpointing == "auto":
        checkpointing = peak_of(False) > USABLE * device
    return MemoryPlan(
        has_gpu=has_gpu,
        device=device,
        resident=resident,
        offloaded=offloaded,
        host=host,
        peak=peak_of(checkpointing),
        checkpointing=checkpointing,
        utilization=utilization,
        cache_tokens=cache_tokens,
        concurrent=concurrent,
        longest=longest,
    )


def engine_workspace(text, longest: int) -> float:
    """What the engine takes on a GPU beside weights and cache. text: the text model's config.

    It holds activations for each token of a pass. For each response that it computes at a time it
    holds logits, log-probabilities, noise and counts of tokens, with 4 bytes per word of the
    vocabulary. CUDA graphs come on top.
    """
    width, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    passed = max(ENGINE_TOKENS, longest) * (4 * width + 3 * inner) * 2
    sampled = ENGINE_RESPONSES * 4 * text.vocab_size * 4
    return passed + sampled + ENGINE_GRAPHS


def training_bytes(args, text, block: int, outside: int, number: int, checkpointing: bool) -> float:
    """What training takes on top of weights, moments and their gradients.

    Args:
        text: the text model's config.
        block, outside: as `count_parameters` has them.
        number: bytes of a number in the forward pass.
        checkpointing: whether the activations of a block are computed twice.
    """
    tokens = max(args.tokens_per_microbatch, args.max_prompt_tokens + args.max_response_tokens)
    width, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    inside_a_block = tokens * (12 * width + 4 * inner) * number  # kept for its backward pass
    activations = text.num_hidden_layers * inside_a_block
    if checkpointing:
        activations = text.num_hidden_layers * tokens * width * number + inside_a_block
    has_entropy = args.entropy_coef or args.method == "srft"
    copies = 5 if has_entropy else 3  # in float32: logits, exponentials, gradient, ...
    logits = copies * CHUNK * text.vocab_size * 4
    logits += 2 * text.vocab_size * width * 4  # the output layer's gradient: a chunk's and the sum
    gathered = (2 * block + outside) * number  # FSDP holds a block, fetches the next
    unreduced = (number + 4) * max(block, outside)  # gradients of a block before they are reduced
    return gathered + unreduced + activations + logits


def count_parameters(config) -> tuple[int, int, int]:
    """(all, those of one block, those outside of the blocks) of a model, from its config alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # no memory for the parameters
        lm = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in lm.parameters())
    blocks = [m for m in lm.modules() if type(m).__name__ in (lm._no_split_modules or [])]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return total, max(sizes, default=0), total - sum(sizes)
