"""A real language model of 135 M parameters: two steps of HPT, an evaluation, its checkpoint.

The model comes from a Python package (toy/smollm2.py), which .ci/run installs. Without the package
these tests are skipped.
"""

import pytest
import torch
from programs import ROOT, metrics, read, run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from toy import smollm2

missing = smollm2.missing_packages()
why = f"not installed: {', '.join(missing)}; toy/smollm2.py says how to install them"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=why)]
LIMIT = 40  # tokens per response
END = "<|im_end|>"  # with which the chat template of this model ends a message


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Eight problems of one operation, and a verifier for which half of all responses are right.

    The base would get none right, and HPT would train on no rollout.
    """
    folder = tmp_path_factory.mktemp("word problems")
    rows = read(ROOT / "toy/word_problems_train.jsonl")
    write_rows(folder / "easy.jsonl", [row for row in rows if row["level"] == "1"][:8])
    (folder / "even.py").write_text("def grade(response, answer): return len(response) % 2 == 0")
    return folder / "easy.jsonl"


@pytest.fixture(scope="module")
def trained(easy):
    """The directory of a run of two steps of HPT; each step has all of the problems."""
    base, out = easy.parent / "base", easy.parent / "run"
    smollm2.main([str(base)])
    one = write_rows(easy.with_name("one.jsonl"), read(easy)[:1])  # held out, to save time
    flags = [f"@{ROOT}/recipes/smollm2-135m-word-problems.args", "--model", base, "--data", easy]
    flags += ["--steps", 2, "--minibatches-per-step", 1, "--warmup-steps", 0, "--lr", 1e-4]
    flags += ["--prompts-per-step", 8, "--samples-per-prompt", 3, "--max-response-tokens", LIMIT]
    flags += ["--gamma", 0.5, "--reward", "even:grade", "--eval-data", one]
    run("train_hpt.py", *flags, "--out", out, ranks=1, folder=easy.parent)
    return out


def test_sampler_and_trainer_agree(trained):
    divergences = [row["mismatch/kl"] for row in metrics(trained) if "mismatch/kl" in row]
    assert divergences and 0 < max(divergences) < 1e-6  # both have computed something


def test_both_parts_of_hpt_are_trained_and_the_loss_of_the_demonstrations_falls(trained):
    first, second = metrics(trained)[-2:]
    assert 0 < first["hpt/sft_frac"] < 1 and 0 < second["hpt/sft_frac"] < 1
    assert second["sft/nll"] < 0.8 * first["sft/nll"]


def test_responses_end_where_the_chat_template_ends_a_message(trained):
    first, second = metrics(trained)[-2:]
    assert first["response_length/clip_ratio"] > 0.5  # the base talks on
    assert second["response_length/clip_ratio"] < first["response_length/clip_ratio"]
    responses = [row["response"] for row in read(trained / "samples.jsonl")]
    assert responses and not any(END in response for response in responses)


def test_the_checkpoint_continues_text_in_transformers_and_in_vllm(trained, easy):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = AutoModelForCausalLM.from_pretrained(trained / "final", dtype=torch.float32)
    chat = [{"role": "user", "content": "Ben has 3 apples. Ben finds 4 more. How many apples?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**prompt, max_new_tokens=LIMIT, do_sample=False)[0]
    response = tokenizer.decode(made[prompt["input_ids"].shape[1] :])
    assert "\\boxed{" in response and response.endswith(END)
    out = easy.parent / "evaluation"
    flags = ["--model", trained / "final", "--data", easy, "--samples", 1, "--temperature", 0]
    flags += ["--system-prompt", "Solve the problem.", "--max-response-tokens", LIMIT]
    run("evaluate.py", *flags, "--out", out)
    results = read(out / "easy.jsonl")
    assert not any(row["truncated"] for row in results)
    assert sum(row["correct"] for row in results) > 0  # the base boxes nothing
