#!/usr/bin/env bash
# What to run on a machine with one GPU, in the order of worth, 18 minutes at most: from the
# repository, `bash tests/on_a_gpu.sh OUT`, OUT being new. Each part has a time limit of its own, so that one that
# fails or hangs does not cost the others; what it prints is in OUT/PART.log. On a machine without a
# GPU, `SHAPE=toy LENGTH=64 bash tests/on_a_gpu.sh OUT` tries the script itself.
set -u
OUT=$(realpath -m "${1:?the directory for the results}")
[ ! -e "$OUT" ] || { echo "$OUT exists already: name another directory"; exit 2; }
SHAPE=${SHAPE:-qwen2.5-1.5b} LENGTH=${LENGTH:-8128}
export PYTHONUNBUFFERED=1 PYTHONPATH="$OUT:$PWD:${PYTHONPATH:-}"
mkdir -p "$OUT"
nvidia-smi > "$OUT/gpu.txt" 2>&1

part() {  # NAME SECONDS COMMAND ...
    local name=$1 seconds=$2 begin=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" > "$OUT/$name.log" 2>&1
    echo "$name: exit status $? after $((SECONDS - begin)) s" | tee -a "$OUT/parts.txt"
}

# 1. vLLM starts, samples, agrees with the trainer (`mismatch` below 1e-2), and warns of no weight.
toy=(torchrun --standalone train_hpt.py --eval-every 0 --eval-samples 1)
part toy 150 env VLLM_LOGGING_LEVEL=WARNING "${toy[@]}" --steps 3 --out "$OUT/toy"

# 2. Weights survive sleep; a resumed run goes on; the gradient in bfloat16 is that of float64.
part tests 180 python -m pytest -q -m "" tests/test_gpu.py

# 3. The update: as it is; not compiled; without cuDNN's attention; with gradient checkpointing.
update=(update --shape "$SHAPE" --lengths "fixed:$LENGTH" --tokens-per-microbatch 8192
    --prompts-per-step 4 --samples-per-prompt 2 --rounds 3)
part update 100 python -m tools.bench "${update[@]}" --gradient-checkpointing off
part update-not-compiled 100 python -m tools.bench "${update[@]}" --gradient-checkpointing off --no-compile
part update-checkpointing 100 python -m tools.bench "${update[@]}" --gradient-checkpointing on
part update-no-cudnn 100 python -c "
import sys, torch
torch.backends.cuda.enable_cudnn_sdp(False)
from tools import bench
bench.main(sys.argv[1:])" "${update[@]}" --gradient-checkpointing off

# 4. Whole steps of HPT on random weights of that shape, with seconds per phase in metrics.jsonl. The
# reward is made up, so that both parts of the loss have a gradient; memory is read as the step runs.
cat > "$OUT/made_up.py" <<'PYTHON'
"""A random model of a shape of tools/bench.py with the toy's tokenizer, and a reward for it."""
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from toy import make
from tools import bench


def reward(response, answer):
    """Right or wrong by chance, but always wrong for half of the questions."""
    return float(len(response) % 2 and int(answer) % 2)


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    shape = dict(zip(bench.CONFIG, bench.SHAPES[name]))
    config = AutoConfig.for_model(**shape, max_position_embeddings=4096, eos_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make.tokenizer().save_pretrained(folder)
PYTHON
part model 120 python "$OUT/made_up.py" "$SHAPE" "$OUT/model"
nvidia-smi --query-gpu=memory.used --format=csv -lms 500 > "$OUT/memory.csv" 2>&1 & watcher=$!
part hpt 240 "${toy[@]}" --model "$OUT/model" --data toy/train.jsonl --reward made_up:reward --method hpt --steps 2 \
    --prompts-per-step 16 --samples-per-prompt 8 --max-response-tokens "$((LENGTH < 1024 ? LENGTH : 1024))" \
    --max-prompt-tokens 64 --lr 1e-6 --tokens-per-microbatch 16384 --out "$OUT/hpt"
kill "$watcher" 2> /dev/null
rm -rf "$OUT/model" "$OUT"/*/final
