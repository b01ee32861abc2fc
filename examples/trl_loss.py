"""TRL's GRPOTrainer with a row of upge's table in place of its own loss.

    python -m examples.trl_loss          the toy's sums with the row grpo, on a CPU
    python -m examples.trl_loss gspo     another row is another word

`UpgeTrainer` is all that you need in a program of your own. TRL samples, shards and saves as ever.
The row brings its advantage, its clip range and its normaliser; TRL's loss_type, scale_rewards,
epsilon, importance_sampling_level and beta (there is no KL term) are not read. Written for
TRL 1.16, for text without tools.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch

from upge import TABLE, upge_loss

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise SystemExit(f"error: {error}: this example needs `pip install trl==1.16.0`") from error

TOY = Path(__file__).resolve().parents[1] / "toy"
# PPO needs a critic, which TRL's trainer has not.
ROWS = [name for name, row in TABLE.items() if row.data == "rollout" and name != "ppo"]


class UpgeTrainer(GRPOTrainer):
    """TRL's GRPOTrainer whose loss is a row of upge's table that needs rollouts and no critic."""

    def __init__(self, *args, row: str = "grpo", **settings):
        if row not in ROWS:
            raise ValueError(f"TRL cannot train the row {row}: choose one of {', '.join(ROWS)}")
        self.row = TABLE[row]
        super().__init__(*args, **settings)

    def _calculate_rewards(self, *args):
        """Keep the rewards of all ranks. What TRL hands on is its own advantages."""
        of_functions = super()._calculate_rewards(*args)  # (all sequences, reward functions)
        self.rewards = (of_functions * self.reward_weights.to(of_functions.device)).nansum(-1)
        return of_functions

    def _generate_and_score_completions(self, inputs):
        """Add advantage and weight of each sequence, before TRL shuffles and cuts the batch."""
        batch = super()._generate_and_score_completions(inputs)
        lengths = self.accelerator.gather(batch["completion_mask"].sum(-1))  # (B,) of all ranks
        n = self.num_generations
        prompt = torch.arange(len(lengths), device=lengths.device) // n  # (B,)
        num_prompts = len(lengths) // n
        weight = self.row.weights(lengths, prompt, num_prompts, self.max_completion_length)
        # The ranks' gradients will be averaged. The batch may serve several optimizer steps.
        updates = self.args.steps_per_generation / self.args.gradient_accumulation_steps
        weight = weight * self.accelerator.num_processes * updates
        advantage = self.row.advantages(self.rewards.view(-1, n)).flatten()
        own = self.accelerator.process_index * len(inputs)  # where this rank's sequences begin
        batch["advantages"] = advantage[own : own + len(inputs)]
        batch["weight"] = weight[own : own + len(inputs)]
        return batch

    def _compute_loss(self, model, inputs):
        """The row's loss of one micro-batch."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        is_response = inputs["completion_mask"].bool()  # (B, S) without the prompts
        # TRL does what response_tokens of upge.py does, at its own temperature: (B, S) each.
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, mask, is_response.shape[1], compute_entropy=True
        )
        old_logp = inputs.get("old_per_token_logps")
        if old_logp is None:  # the policy has not moved since it sampled
            old_logp = logp.detach()
        logp, old_logp, entropy = (x[is_response].float() for x in (logp, old_logp, entropy))
        seq = is_response.nonzero()[:, 0]  # (M,)
        A, weight = inputs["advantages"][seq], inputs["weight"][seq]
        return upge_loss(self.row, logp, seq, A, weight, old_logp, entropy)[0]


def reward(completions: list[str], answer: list[str], **_) -> list[float]:
    """1 for each completion whose last \\boxed{} holds the answer, else 0."""
    boxed = [re.findall(r"\\boxed\{([^{}]*)\}", text) for text in completions]
    return [float(found[-1:] == [right]) for found, right in zip(boxed, answer)]


def main(row: str = "grpo", steps: int = 10) -> list[dict]:
    """Train on the toy; TRL prints the metrics of each step. Returns them."""
    lines = [json.loads(line) for line in (TOY / "train.jsonl").read_text().splitlines()]
    # The line break is what the toy's chat template writes behind a prompt.
    problems = [{"prompt": p["prompt"] + "\n", "answer": p["answer"]} for p in lines]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            num_generations=8,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=2,
            max_completion_length=112,
            learning_rate=1e-3,
            max_steps=steps,
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model, data = str(TOY / "base"), Dataset.from_list(problems)
        trainer = UpgeTrainer(model, reward, config, data, row=row)
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser("examples.trl_loss", allow_abbrev=False)
    parser.add_argument(
        "row", nargs="?", default="grpo", choices=ROWS, help="of upge's table (%(default)s)"
    )
    main(parser.parse_args().row)
