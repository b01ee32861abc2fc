"""Train with TRL's GRPOTrainer, one step for each line on standard input.

`python -m tools.bench step --peer trl` starts it, and measures its steps beside ours. It is a
process of its own, since TRL wants the process group for itself. It writes a line of JSON when it
is ready, and one for each step. Model, prompts, lengths and updates are those of train_hpt.py with
the same flags.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import reward
import train_hpt
from common import flags
from upge import METHODS


def main() -> None:
    """Build the trainer, say so, and train."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to standard output, too
    os.dup2(2, 1)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    bench, rest = parser.parse_known_args()
    args = flags.parse_training_args(rest)
    with tempfile.TemporaryDirectory() as folder, reward.Verifier(function=args.reward) as verifier:
        config = grpo_config(args, bench.steps, bench.batch, folder)
        dataset, tokenizer = read_problems(args, bench.steps)
        seen = {}  # of the last rollouts

        def rewards_of(completions, completion_ids, answer, **_):
            """Our verifier's rewards; TRL calls it once per step."""
            rewards, n = verifier.score(completions, answer), args.samples_per_prompt
            seen["lengths"] = list(map(len, completion_ids))
            seen["rewards"] = [rewards[i : i + n] for i in range(0, len(rewards), n)]
            return rewards

        turns = TakeTurns(args.minibatches_per_step, answers, seen)
        trainer = GRPOTrainer(
            args.model, rewards_of, config, dataset, processing_class=tokenizer, callbacks=[turns]
        )
        engine = "vLLM (colocate)" if config.use_vllm else "transformers"
        ready = (
            f"GRPOTrainer samples with {engine}, {config.per_device_train_batch_size} sequences "
            f"per forward pass, {torch.get_num_threads()} torch threads"
        )
        answers.write(json.dumps(ready) + "\n")
        trainer.train()


class TakeTurns(TrainerCallback):
    """Waits for a line before the first update of a step, and reports after the last."""

    def __init__(self, updates_per_step: int, answers, seen: dict):
        self.updates_per_step, self.answers, self.seen = updates_per_step, answers, seen

    def on_step_begin(self, _, state, control, **others) -> None:
        """Called before every update; the first of a step begins with the rollouts."""
        if state.global_step % self.updates_per_step == 0:
            if not sys.stdin.readline():  # the benchmark has ended
                raise SystemExit
            self.begin = time.perf_counter()

    def on_step_end(self, _, state, control, **others) -> None:
        """Called after every update."""
        if state.global_step % self.updates_per_step == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.begin
            self.answers.write(json.dumps({"seconds": seconds} | self.seen) + "\n")


def read_problems(args, steps: int):
    """(Dataset of the prompts in the order of our steps, tokenizer)."""
    inputs = train_hpt.load_inputs(args, METHODS[args.method])
    problems = []
    for step in range(1, steps + 1):
        problems += train_hpt.draw(inputs.problems, step, args.prompts_per_step, args.seed)
    texts = [inputs.tokenizer.decode(problem["prompt_ids"]) for problem in problems]
    if inputs.tokenizer(texts)["input_ids"] != [problem["prompt_ids"] for problem in problems]:
        raise SystemExit("error: TRL would read the prompts as other tokens than train_hpt.py")
    rows = {"prompt": texts, "answer": [problem["answer"] for problem in problems]}
    return Dataset.from_dict(rows), inputs.tokenizer


def grpo_config(args, steps: int, batch: int | None, folder: str) -> GRPOConfig:
    """Our settings in TRL's words. batch: sequences per forward pass, by default all of an update.

    TRL samples with vLLM on a GPU, else with transformers: on a CPU, vLLM 0.32 repacks its weights,
    and then has no weight loaders, which TRL 1.16 needs to give it new ones.
    """
    gpu = torch.cuda.is_available()
    sequences = args.prompts_per_step * args.samples_per_prompt
    per_update = sequences // args.minibatches_per_step
    batch = batch or per_update
    if sequences % args.minibatches_per_step or per_update % batch:
        raise SystemExit(
            f"error: TRL needs equal parts, but {sequences} rollouts are to make "
            f"{args.minibatches_per_step} updates of batches of {batch}"
        )
    return GRPOConfig(
        output_dir=folder,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        epsilon=args.clip_eps or 0.2,
        num_generations=args.samples_per_prompt,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=per_update // batch,
        steps_per_generation=sequences // batch,
        max_steps=steps * args.minibatches_per_step,
        max_completion_length=args.max_response_tokens,
        temperature=args.temperature,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=gpu,
        model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
        use_vllm=gpu,
        vllm_mode="colocate",
        vllm_max_model_length=args.max_prompt_tokens + args.max_response_tokens,
        seed=args.seed,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
