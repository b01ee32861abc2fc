"""HPT in a plain Hugging Face loop: transformers, torch and upge.py, nothing else.

    python -m examples.hf_loop      the toy's sums on a CPU, in two to four minutes

A page to begin your own trainer from: copy it and upge.py into one folder, name your MODEL and
DATA, and write your own `reward`. It takes the steps of Algorithm 1 of arXiv 2509.04419, as
train_hpt.py does, but without vLLM, FSDP and micro-batches.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from upge import TABLE, Row, hpt_gate, response_tokens, upge_loss

TOY = Path(__file__).resolve().parents[1] / "toy"
MODEL, DATA = TOY / "base", TOY / "train.jsonl"  # lines of {"prompt", "answer", "demonstration"}
PROMPTS, ROLLOUTS = 16, 8  # N prompts per step, n rollouts of each
L_MAX = 112  # the largest allowed length of a response, in tokens
GAMMA, SFT_COEF, LR, TEMPERATURE = 0.0, 0.05, 1e-3, 1.0


def main(steps: int = 25) -> None:
    """Train; print the reward and the share of gated prompts of every step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama's has none
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    problems = [json.loads(line) for line in DATA.read_text().splitlines()]
    for step in range(1, steps + 1):
        drawn = [problems[i] for i in torch.randperm(len(problems))[:PROMPTS]]
        prompts = [prompt_ids(tokenizer, p["prompt"]) for p in drawn]
        texts = [p["demonstration"] + tokenizer.eos_token for p in drawn]
        demos = tokenizer(texts, add_special_tokens=False).input_ids
        rollouts = sample(model, tokenizer, prompts)
        rewards = []
        for p, group in zip(drawn, rollouts):
            texts = tokenizer.batch_decode(group, skip_special_tokens=True)
            rewards.append([reward(text, p["answer"]) for text in texts])
        R = torch.tensor(rewards)  # (N, n)
        loss, gated = hpt_loss(model, prompts, rollouts, demos, R)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3}  reward {R.mean():.3f}  gated {gated:.3f}", flush=True)


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The tokens of the question, as the model's chat template writes it."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def reward(response: str, answer: str) -> float:
    """1 if the last \\boxed{} holds the answer, else 0."""
    return float(re.findall(r"\\boxed\{([^{}]*)\}", response)[-1:] == [answer])


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]]) -> list[list[list[int]]]:
    """ROLLOUTS responses of each prompt, as token ids that end in the end-of-sequence token."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    # Sample from the policy itself: a generation_config.json of the model may say otherwise, and by
    # default transformers leaves out all but 50 tokens.
    end = tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    sampling |= {"repetition_penalty": 1.0, "eos_token_id": end, "pad_token_id": end}
    out = model.generate(**padded, **sampling, max_new_tokens=L_MAX, num_return_sequences=ROLLOUTS)
    responses = []
    for ids in out[:, padded["input_ids"].shape[1] :].tolist():  # (N n, T) without the prompts
        responses.append(ids[: ids.index(end) + 1] if end in ids else ids)  # without the padding
    return [responses[i : i + ROLLOUTS] for i in range(0, len(responses), ROLLOUTS)]


def hpt_loss(model, prompts: list, rollouts: list, demos: list, R: Tensor) -> tuple[Tensor, float]:
    """HPT's loss of a step with rewards R (N, n), and the share of gated prompts."""
    alpha, beta = hpt_gate(R, GAMMA)  # (N,) each: 1 and 0, or 0 and 1
    A = TABLE["dr_grpo"].advantages(R).tolist()  # (N, n)
    rl, sft = [], []  # (index of the prompt, prompt, response, advantage)
    for q, prompt in enumerate(prompts):
        if alpha[q]:
            rl += [(q, prompt, response, a) for response, a in zip(rollouts[q], A[q])]
        if beta[q]:
            sft.append((q, prompt, demos[q], 1.0))
    rl_loss = row_loss(model, TABLE["dr_grpo"], rl, len(prompts))
    sft_loss = row_loss(model, TABLE["sft"], sft, len(prompts))
    return rl_loss + SFT_COEF * sft_loss, beta.double().mean().item()


def row_loss(model, row: Row, sequences: list[tuple], num_prompts: int) -> Tensor:
    """The loss of a row of upge's table on its B sequences, in a step of `num_prompts` prompts."""
    if not sequences:
        return torch.zeros(())
    index, prompts, responses, A = zip(*sequences)
    ids = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses)]
    ids = pad_sequence(ids, batch_first=True)  # (B, S), padded on the right: no mask is needed
    begin = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    lengths = torch.tensor([len(response) for response in responses])  # (B,)
    place = torch.arange(ids.shape[1])  # (S,)
    is_response = (begin[:, None] <= place) & (place < (begin + lengths)[:, None])  # (B, S)
    logp, seq = response_tokens(model(ids).logits, ids, is_response, TEMPERATURE)  # (M,) each
    # Every 1/length, 1/n and 1/N is in the weights, and N counts the prompts of both rows. So the
    # loss is a sum: divide it by nothing.
    weight = row.weights(lengths, torch.tensor(index), num_prompts, L_MAX)  # (B,)
    old_logp = logp.detach()  # with one update per step, pi_old is the policy itself
    return upge_loss(row, logp, seq, torch.tensor(A)[seq], weight[seq], old_logp)[0]


if __name__ == "__main__":
    main()
