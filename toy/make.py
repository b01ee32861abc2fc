"""The embedded default: a tiny Qwen2 that adds unreliably, and sums to train it on. No download.

A question is a sum of two d-digit numbers (d is its level, 1 to 6). A demonstration works it
column by column from the right, digit + digit + carry, and ends in the boxed answer:

    47+85  ->  7+5+0=12;4+8+1=13;\\boxed{132}

The base has read such sums with the written column totals often wrong (WRONG, by column): it knows
the rule but speaks it unreliably, so its sampled accuracy falls from about 80% at level 1 to about
1% at level 6, and a guess of the answer never succeeds. The training set holds more of the hard
levels than of the easy ones, the held-out set equally many of each.

    python toy.py              make the base again, into toy_base/ (about 7 minutes on two cores)

`train_hpt.py` knows nothing of this file but `defaults()`, which it asks for when --model is absent.
"""
import json
import os
import random
from pathlib import Path

HERE = Path(__file__).parent
BASE = HERE / "toy_base"  # shipped: 0.8 M parameters in bfloat16
LEVELS = range(1, 7)
WRONG = (0.15, 0.45, 0.62, 0.62, 0.62, 0.62)  # chance that the base's corpus has column i wrong
HELD_OUT = 32  # problems of each level
TRAIN = (49, 150, 300, 500, 500, 500)  # problems by level; of one-digit numbers there are only 81 sums


def solve(a, b, wrong=None):
    """Work the sum a + b of equally long numbers column by column; return (text, answer as str).

    With `wrong` = (random.Random, probabilities by column), written column totals are corrupted
    with those probabilities and everything after follows from the corrupted ones.
    """
    text, digits, carry = "", "", 0
    for i, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        total = int(x) + int(y) + carry
        if wrong and wrong[0].random() < wrong[1][i]:
            total = wrong[0].choice([t for t in range(20) if t != total])
        text += f"{x}+{y}+{carry}={total};"
        digits, carry = str(total % 10) + digits, total // 10
    answer = str(carry) * (carry > 0) + digits
    return text + f"\\boxed{{{answer}}}", answer


def draw(rng, level):
    """A random pair of `level`-digit numbers without a leading zero."""
    return tuple(rng.randrange(10 ** (level - 1), 10**level) for _ in "ab")


def problems(seed=0, counts=dict(zip(LEVELS, TRAIN))):
    """(train, held out): disjoint lists of {prompt, answer, demonstration, level}; counts: of training problems, by level."""
    rng, train, held_out = random.Random(f"toy problems {seed}"), [], []
    for level, count in counts.items():
        pairs = {}  # a dict keeps the order in which they were drawn
        while len(pairs) < HELD_OUT + count:
            pairs[draw(rng, level)] = None
        rows = []
        for a, b in pairs:
            demonstration, answer = solve(a, b)
            rows.append({"prompt": f"{a}+{b}", "answer": answer, "demonstration": demonstration, "level": level})
        held_out += rows[:HELD_OUT]
        train += rows[HELD_OUT:]
    return train, held_out


def defaults():
    """Flag values for train_hpt.py when no --model is given; writes the data files it names."""
    train, held_out = problems()
    folder = HERE / ".toy_data"
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        unfinished = folder / f"{name}.{os.getpid()}"  # several ranks may write at once
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
        unfinished.replace(folder / f"{name}.jsonl")
    return dict(
        model=str(BASE), data=str(folder / "train.jsonl"), eval_data=str(folder / "held_out.jsonl"),
        max_prompt_tokens=16, max_response_tokens=112, prompts_per_step=32, steps=60, eval_every=10,
        lr=1e-4, critic_lr=1e-3, warmup_steps=5, tokens_per_microbatch=2048, gradient_checkpointing=False,
    )


def tokenizer():
    """Qwen2's tokenizer with a vocabulary of bytes and `boxed`; its chat template is the bare question."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("b", "o"), ("bo", "x"), ("box", "e"), ("boxe", "d")]
    words += ["".join(pair) for pair in merges]
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges,
                          pad_token="<pad>", eos_token="<eos>", unk_token=None)
    made.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    return made


def make_base(folder, batches=2000, batch_size=64, lr=2e-3, seed=0):
    """Train the base on corrupted sums and save it as a Hugging Face directory in bfloat16."""
    import torch
    from tqdm import trange
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    rng, tok = random.Random(f"toy base {seed}"), tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=batches, pct_start=0.05)
    bar = trange(batches, desc="toy base", mininterval=1)
    for _ in bar:
        rows, starts = [], []
        for _ in range(batch_size):
            a, b = draw(rng, rng.choice(LEVELS))
            prompt = tok.encode(f"{a}+{b}\n")
            rows.append(prompt + tok.encode(solve(a, b, (rng, WRONG))[0]) + [tok.eos_token_id])
            starts.append(len(prompt))
        ids = torch.full((batch_size, max(map(len, rows))), tok.pad_token_id)  # (B, T)
        labels = torch.full_like(ids, -100)
        for i, (row, start) in enumerate(zip(rows, starts)):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, start : len(row)] = ids[i, start : len(row)]
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)


if __name__ == "__main__":
    make_base(BASE)
