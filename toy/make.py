"""The toy on which train_hpt.py trains by default: sums, and a tiny model that adds unreliably.

A problem is a sum of two numbers of equally many digits, 1 to 6, which is its level. Its
demonstration works column by column from the right, digit+digit+carry=total, and ends in the
answer:

    47+85    7+5+0=12;4+8+1=13;\\boxed{132}

The base model was trained on such sums, but with many column totals wrong. So it knows the form
and the rule, but it follows the rule unreliably: about 80% of its sampled answers are right at
level 1, and about 1% at level 6. A guess of the answer never succeeds.

    python -m toy.make data    makes train.jsonl and held_out.jsonl again
    python -m toy.make base    trains base/ again, in about 7 minutes on two cores

All of these files are shipped, and toy.args names them: training makes none of them.
"""

import argparse
import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BASE = FOLDER / "base"  # 0.8 M parameters in bfloat16
LEVELS = range(1, 7)
# Training problems per level: more hard than easy ones. Of one-digit numbers there are 81 sums.
TRAIN = {1: 49, 2: 150, 3: 300, 4: 500, 5: 500, 6: 500}
HELD_OUT = 32  # held-out problems per level
# The chance that a column total is wrong in what the base model was trained on, from the right.
WRONG = (0.15, 0.45, 0.62, 0.62, 0.62, 0.62)


def solve(a: int, b: int, rng: random.Random | None = None) -> tuple[str, str]:
    """Work the sum of two numbers of equally many digits; return the text and its answer.

    With `rng`, column totals are wrong with the chances of WRONG, and everything after a wrong
    total follows from it.
    """
    text, digits, carry = "", "", 0
    for column, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        total = int(x) + int(y) + carry
        if rng and rng.random() < WRONG[column]:
            total = rng.choice([other for other in range(20) if other != total])
        text += f"{x}+{y}+{carry}={total};"
        digits = str(total % 10) + digits
        carry = total // 10
    answer = f"{carry}{digits}" if carry else digits
    return f"{text}\\boxed{{{answer}}}", answer


def draw(rng: random.Random, level: int) -> tuple[int, int]:
    """Return two random numbers of `level` digits, without a leading zero."""
    smallest, end = 10 ** (level - 1), 10**level
    return rng.randrange(smallest, end), rng.randrange(smallest, end)


def problems(seed: int = 0, counts: dict[int, int] = TRAIN) -> tuple[list[dict], list[dict]]:
    """Return training and held-out problems, all different.

    counts: {level: number of training problems}. Of each level there are HELD_OUT held-out ones.
    """
    rng = random.Random(f"toy problems {seed}")
    train, held_out = [], []
    for level, count in counts.items():
        pairs = {}  # as a set, but in the order in which they were drawn
        while len(pairs) < HELD_OUT + count:
            pairs[draw(rng, level)] = None
        rows = []
        for a, b in pairs:
            demonstration, answer = solve(a, b)
            row = {"prompt": f"{a}+{b}", "answer": answer, "demonstration": demonstration}
            rows.append(row | {"level": level})
        held_out += rows[:HELD_OUT]
        train += rows[HELD_OUT:]
    return train, held_out


def write_data(folder: Path) -> None:
    """Write the problems as train.jsonl and held_out.jsonl."""
    for name, rows in zip(("train", "held_out"), problems()):
        write_jsonl(folder / f"{name}.jsonl", rows)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer():
    """Return Qwen2's tokenizer with bytes and `boxed` as its tokens.

    Its chat template is the question and a line break.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("b", "o"), ("bo", "x"), ("box", "e"), ("boxe", "d")]
    words += ["".join(pair) for pair in merges]
    made = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
    )
    made.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    return made


def make_base(folder: Path, batches: int = 2000, batch_size: int = 64, lr: float = 2e-3) -> None:
    """Train the base model on wrongly worked sums; save it as a Hugging Face directory."""
    import torch
    from tqdm import trange
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    rng, tok = random.Random("toy base 0"), tokenizer()
    config = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, batches, pct_start=0.05)
    bar = trange(batches, desc="toy base", mininterval=1)
    for _ in bar:
        ids, labels = training_batch(rng, tok, batch_size)
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)


def training_batch(rng: random.Random, tok, batch_size: int):
    """Return (B, T) token ids and labels of wrongly worked sums; prompts have no labels."""
    import torch

    rows, prompt_lengths = [], []
    for _ in range(batch_size):
        a, b = draw(rng, rng.choice(LEVELS))
        prompt = tok.encode(f"{a}+{b}\n")
        rows.append(prompt + tok.encode(solve(a, b, rng)[0]) + [tok.eos_token_id])
        prompt_lengths.append(len(prompt))
    ids = torch.full((batch_size, max(map(len, rows))), tok.pad_token_id)
    labels = torch.full_like(ids, -100)  # -100: no label
    for i, (row, start) in enumerate(zip(rows, prompt_lengths)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
    return ids, labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", "base"), help="what to make again")
    if parser.parse_args().what == "data":
        write_data(FOLDER)
    else:
        make_base(BASE)
