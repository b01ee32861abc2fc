"""Gates of one's own: what `--gate MODULE:FUNCTION` of train_hpt.py may name.

    torchrun train_hpt.py --gate examples.gates:smooth
    torchrun train_hpt.py --method chord --gate examples.gates:chord

A gate says how much each of N prompts trains on its rollouts (alpha) and on its demonstration
(beta). It gets the rewards (N, n) of the n rollouts of each prompt and the step, which counts from
1. It returns alpha and beta, (N,) each. The paper's general f and g of P are a gate like these.
"""

import math

import torch
from torch import Tensor

# CHORD's schedule. These are the constants of its paper's CHORD-phi: mu is 0.1 in every step.
# CHORD-mu has PEAK, VALLEY = 0.9, 0.05 and WARMUP, DECAY = 0, 200.
PEAK, VALLEY = 0.1, 0.1
WARMUP, DECAY = 0, 0  # numbers of steps


def smooth(rewards: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(P, 1 - P) per prompt, (N,) float64 each; P is the mean reward of its rollouts (N, n)."""
    P = rewards.double().mean(-1)
    return P, 1 - P


def chord(rewards: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """CHORD's (1 - mu, mu) for each of the N prompts, (N,) float64 each: arXiv 2508.11408, eq. 3.

    mu rises in a line from 0 to PEAK, which it has at step WARMUP. Then it falls to VALLEY, along
    half a cosine, in DECAY steps, and stays there.
    """
    if step < WARMUP:
        mu = PEAK * step / WARMUP
    else:
        fallen = min(1.0, (step - WARMUP) / DECAY) if DECAY else 1.0  # how much of the way, in time
        mu = VALLEY + (PEAK - VALLEY) * (1 + math.cos(math.pi * fallen)) / 2
    beta = torch.full((len(rewards),), mu, dtype=torch.double)
    return 1 - beta, beta
