"""Micro-batches: which sequences go through the model together, on which rank, as flat tensors.

Sequences stand one after the other, without padding. A micro-batch has T tokens of prompts and
responses, of which M are response tokens, the ones that are trained on.
"""

import dataclasses
import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from common import distributed
from upge import TABLE, Row


class Sequence(NamedTuple):
    """One response to train on, a rollout or a demonstration, with the prompt that it answers."""

    prompt_ids: list[int]
    response_ids: list[int]
    is_demo: bool
    prompt: int  # 0 .. N-1, the index of the prompt in its mini-batch
    advantage: float  # in PPO the reward, of which `critic.value_pass` makes advantages
    weight: float = 0.0  # of each of its response tokens in the loss
    sampler_logp: list[float] | None = None  # of a rollout, one per response token


@dataclasses.dataclass
class MicroBatch:
    """B sequences of one row of the table that go through the model together."""

    row: Row
    ids: Tensor  # (T,) int64
    is_response: Tensor  # (T,) bool, true at the M response tokens
    lengths: list[int]  # (B,) tokens of each sequence
    response_lengths: list[int]  # (B,) response tokens of each sequence
    prompts: list[int]  # (B,) the prompt of each sequence; empty in a filler
    seq: Tensor  # (M,) int64, the sequence of a token, 0 .. B-1
    advantage: Tensor  # (M,)
    weight: Tensor  # (M,)
    # These are (M,); they are None for demonstrations and fillers, and until they are set.
    sampler_logp: Tensor | None = None  # log-probabilities as the sampler reported them
    old_logp: Tensor | None = None  # log pi_old, as `set_old_policy` of train_hpt.py sets it
    value: Tensor | None = None  # PPO: the critic's, before the update
    returns: Tensor | None = None  # PPO: what the critic fits

    @property
    def is_filler(self) -> bool:
        """Whether it only keeps a rank in step that has no sequence left; its weight is 0."""
        return not self.prompts

    @property
    def is_rollouts(self) -> bool:
        """Whether its row trains on rollouts."""
        return self.row.data == "rollout"


def build_micro_batches(
    by_row: dict[str, list[Sequence]], budget: int, entropy_coef: float, device, counts
) -> list[MicroBatch]:
    """This rank's micro-batches of a mini-batch, row by row; there may be none.

    Every rank computes the plan of all ranks. So they agree on the number of micro-batches without
    having to communicate.

    Args:
        by_row: {row of the table: its sequences}, the same on every rank.
        budget: the most tokens of a micro-batch, unless it is a single sequence.
        entropy_coef: the weight of the entropy bonus.
        counts: metrics.Counts.
    """
    micro_batches = []
    for name, sequences in by_row.items():
        row = TABLE[name]
        computed = [s for s in sequences if has_signal(s, row, entropy_coef)]
        counts.sequences += len(sequences)
        counts.computed_sequences += len(computed)
        plans = plan_micro_batches(computed, distributed.world_size(), budget)
        micro_batches += [collate(row, part, device) for part in plans[distributed.rank()]]
    return micro_batches


def has_signal(s: Sequence, row: Row, entropy_coef: float) -> bool:
    """Whether a sequence can contribute to the gradient.

    The loss is proportional to A. So a sequence with A = 0 need not be computed, unless it feeds
    the entropy bonus, or its A is still a reward, which the critic turns into advantages.
    """
    in_bonus = entropy_coef > 0 and row.data == "rollout"
    return s.advantage != 0 or in_bonus or row.advantage == "GAE(R)"


def plan_micro_batches(sequences: list[Sequence], ranks: int, budget: int) -> list[list[list]]:
    """For each rank its micro-batches, which are lists of sequences.

    FSDP's ranks move together, pass by pass: so all have equally many micro-batches, and those of
    a pass should take equally long. Longest first, each sequence goes to the place (a rank's
    micro-batch of a pass) that has the fewest tokens so far. If there are more places than
    sequences, some ranks get empty lists, of which `collate` makes fillers.
    """
    longest_first = sorted(sequences, key=total_length, reverse=True)
    total = sum(min(total_length(s), budget) for s in sequences)
    passes = min(math.ceil(total / (budget * ranks)), math.ceil(len(sequences) / ranks))
    while True:  # with as many places as sequences, each has its own
        places = [[] for _ in range(passes * ranks)]
        loads = [(0, i) for i in range(len(places))]  # (tokens, place), as a heap
        for s in longest_first:
            tokens, i = loads[0]  # the least
            heapq.heapreplace(loads, (tokens + total_length(s), i))
            places[i].append(s)
        if all(tokens <= budget or len(places[i]) == 1 for tokens, i in loads):
            return [places[rank::ranks] for rank in range(ranks)]
        passes += 1


def total_length(s: Sequence) -> int:
    """Tokens of prompt and response."""
    return len(s.prompt_ids) + len(s.response_ids)


def collate(row: Row, sequences: list[Sequence], device) -> MicroBatch:
    """A MicroBatch of the sequences; without any, a filler: two tokens, of weight 0."""
    batch = sequences or [Sequence([0], [0], True, 0, 0.0)]
    ids, is_response = [], []
    for s in batch:
        ids += [*s.prompt_ids, *s.response_ids]
        is_response += [False] * len(s.prompt_ids) + [True] * len(s.response_ids)
    response_lengths = [len(s.response_ids) for s in batch]
    seq = torch.arange(len(batch)).repeat_interleave(torch.tensor(response_lengths))  # (M,)
    sampler_logp = None
    if batch[0].sampler_logp is not None:
        sampler_logp = torch.tensor([x for s in batch for x in s.sampler_logp], device=device)
    return MicroBatch(
        row=row,
        ids=torch.tensor(ids, device=device),
        is_response=torch.tensor(is_response, device=device),
        lengths=[total_length(s) for s in batch],
        response_lengths=response_lengths,
        prompts=[s.prompt for s in sequences],
        seq=seq.to(device),
        advantage=torch.tensor([s.advantage for s in batch])[seq].to(device),
        weight=torch.tensor([s.weight for s in batch])[seq].to(device),
        sampler_logp=sampler_logp,
    )
