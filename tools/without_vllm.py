"""Train without vLLM: transformers samples in its place.

    torchrun --nproc_per_node=N -m tools.without_vllm [flags of train_hpt.py]

It runs everything but vLLM, on a machine that has the other packages: FSDP, NCCL, bfloat16,
checkpoints. docs/gpu.md says what it has shown on a GPU. It samples slowly, and a response depends
on which others are sampled with it. What a run says of the engine's memory, and the commands that
it prints at its end, are for machines that have vLLM.
"""

from common import flags, terminal

# As in train_hpt.py, flags are read before the slow imports.
ARGS = flags.parse_training_args() if __name__ == "__main__" else None

from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rollout
import train_hpt
from common import distributed
from common.attention import keep_softcap
from common.model import tempered_logits

BATCH = 512  # responses that are sampled together: their keys and values must fit into memory


def main(args) -> None:
    """Run train_hpt.py with `TransformersSampler` for its sampler."""
    if args.plan is not None:
        raise SystemExit("error: --plan: a plan counts vLLM's memory: python train_hpt.py --plan")
    if args.tensor_parallel != 1:
        raise SystemExit("error: --tensor-parallel: each rank samples by itself here: leave it out")
    with (
        mock.patch.object(rollout, "check_vllm"),
        mock.patch.object(rollout, "Sampler", TransformersSampler),
        distributed.one_failure_message(),
        terminal.closing(),
    ):
        train_hpt.main(args)


class TransformersSampler:
    """A sampler with those methods of rollout.Sampler that a training run calls."""

    tensor_parallel = 1

    def __init__(
        self,
        model,
        *,
        max_response_tokens,
        temperature,
        config_overrides,
        end_token_ids,
        trust_remote_code=False,
        **of_the_engine,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        code = {"trust_remote_code": trust_remote_code}
        config = config_overrides(AutoConfig.from_pretrained(model, **code))
        lm = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=dtype, **code)
        keep_softcap(lm)
        self.lm = lm.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model, **code)
        self.max_response_tokens, self.temperature = max_response_tokens, temperature
        self.end_token_ids = end_token_ids

    def load(self, named_tensors) -> None:
        """Replace the weights."""
        mine = dict(self.lm.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in named_tensors:
                mine[name].copy_(tensor)

    def sleep(self) -> None:
        """Do nothing: the weights stay where they are."""

    def close(self) -> None:
        """End the process group, as rollout.Sampler does."""
        torch.distributed.destroy_process_group()

    def stream(self, prompts: list, seeds: list, n: int, with_logp: bool = True):
        """As rollout.Sampler.stream: yield (index of the prompt, its n responses)."""
        yield from enumerate(self.generate(prompts, seeds, n))

    def generate(self, prompts: list, seeds: list, n: int, label: str | None = None) -> list:
        """As rollout.Sampler.generate: n Rollouts of each prompt."""
        wanted = [(prompt, seed) for prompt, seed in zip(prompts, seeds) for _ in range(n)]
        responses = []
        with terminal.progress(label, len(wanted)) as part:
            for start in range(0, len(wanted), BATCH):
                batch = wanted[start : start + BATCH]
                # The seed of the first serves all; `start` tells batches of one prompt apart.
                responses += self.sample([prompt for prompt, _ in batch], seed=batch[0][1] + start)
                part.update(len(batch))
        return [responses[i : i + n] for i in range(0, len(responses), n)]

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seed: int) -> list[rollout.Rollout]:
        """One response to each of B prompts, token by token."""
        generator = torch.Generator(self.device).manual_seed(seed)
        longest = max(map(len, prompts))  # P
        padded = [[0] * (longest - len(p)) + p for p in prompts]  # on the left
        is_token = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        ids = torch.tensor(padded, device=self.device)  # (B, P), then (B, 1)
        mask = torch.tensor(is_token, device=self.device)  # (B, P), then one more with each token
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, P), then (B, 1)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        cache, tokens, logps = None, [], []
        while len(tokens) < self.max_response_tokens and not ended.all():
            output = self.lm.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            all_logp = self.all_logp(output.last_hidden_state[:, -1])  # (B, V)
            # The largest of log p + Gumbel noise is a sample of p.
            noise = torch.empty_like(all_logp).exponential_(generator=generator).log()
            ids = (all_logp - noise).argmax(-1, keepdim=True)
            tokens.append(ids)
            logps.append(all_logp.gather(-1, ids))
            ended |= torch.isin(ids[:, 0], torch.tensor(self.end_token_ids, device=self.device))
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
        return list(
            map(self.to_rollout, torch.cat(tokens, 1).tolist(), torch.cat(logps, 1).tolist())
        )

    def all_logp(self, states: Tensor) -> Tensor:
        """(B, V) log-probabilities of the next token from the last states (B, D)."""
        return tempered_logits(self.lm, states, self.temperature).log_softmax(-1)

    def to_rollout(self, ids: list[int], logp: list[float]) -> rollout.Rollout:
        """A Rollout from tokens that may go on after the end of the response."""
        ends = (i + 1 for i, token in enumerate(ids) if token in self.end_token_ids)
        length = next(ends, None)
        ids, logp = ids[:length], logp[:length]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return rollout.Rollout(ids, logp, truncated=length is None, text=text)


if __name__ == "__main__":
    main(ARGS)
