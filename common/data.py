"""Problems with demonstrations, from a file or the hub, rendered to token ids.

A problem is a dict: "prompt" (str), "answer" (str, or a list of accepted ones), "demonstration" (str, absent where a
method needs none), and where the source has them "system" (str) and "level" (any label by which results are broken down).
"""
import json
import math
from pathlib import Path

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN = "Question:\n{prompt}\n" + SYSTEM + "\nAnswer:\nLet's think step by step."


def load_problems(source, need_demonstration=False, flag="--data"):
    """Read problems from a .jsonl, .json (a list) or .parquet file, or the hub data set `source` (split train).

    Rows have `prompt`, `answer`, `demonstration` as above, or the layout of the paper's training set
    (Elliott/Openr1-Math-46k-8192): `prompt` a list of messages, `target` a list with the demonstration,
    `reward_model.ground_truth` the answer. Demonstrations are read where they are needed. Raises SystemExit with the
    file and line of the first bad row; `flag` is the one that named the source.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") or path.exists():
        if not path.is_file():
            what = "a directory; name a file in it" if path.is_dir() else "no such file"
            raise SystemExit(f"error: {flag} {source}: {what}")
        if path.suffix not in (".jsonl", ".json", ".parquet"):
            raise SystemExit(f"error: {flag} {source}: a data file ends in .jsonl, .json or .parquet")
        rows = list(_read(path))
    else:
        rows = list(enumerate(load_hub(source, None, "train", f"{flag} {source}: not a file here, and"), 1))
    if not rows:
        raise SystemExit(f"error: {flag} {source}: no rows")
    return [_problem(row, f"{source}:{line}", need_demonstration) for line, row in rows]


def load_hub(source, config, split, who):
    """The rows (dicts) of a hub data set, or SystemExit with a sentence that begins with `who`."""
    datasets = _need("datasets")
    try:
        return list(datasets.load_dataset(source, config, split=split))
    except Exception as error:  # the hub has dozens of ways to fail; each names its reason
        raise SystemExit(f"error: {who} the hub data set {source} cannot be loaded: {error}") from error


def _need(module):
    try:
        return __import__(module)
    except ImportError as error:
        raise SystemExit(f"error: this data needs the package '{module}': pip install datasets") from error


def _read(path):
    """Yield (line or row number from 1, row) of a file."""
    if path.suffix == ".parquet":
        _need("pyarrow")
        import pyarrow.parquet
        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (pyarrow.ArrowException, OSError) as error:
            raise SystemExit(f"error: {path}: not a parquet file: {error}") from error
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: {path}: not UTF-8 text: {error}") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise SystemExit(f"error: {path}:{error.lineno}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise SystemExit(f"error: {path}: nested too deeply") from error
        if not isinstance(rows, list):
            raise SystemExit(f"error: {path}: a .json file must hold a list of problems; one problem a line is .jsonl")
        yield from enumerate(rows, 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise SystemExit(f"error: {path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            except RecursionError as error:
                raise SystemExit(f"error: {path}:{number}: nested too deeply") from error


def _problem(row, where, need_demonstration):
    """One row in either layout, checked."""
    if not isinstance(row, dict):
        raise SystemExit(f"error: {where}: a problem is an object with 'prompt' and 'answer', not {type(row).__name__}")
    flat = dict(row)
    if isinstance(row.get("prompt"), list):  # the paper's training set
        try:
            said = {message["role"]: message["content"] for message in row["prompt"]}
            flat = {"prompt": said["user"], "answer": row["reward_model"]["ground_truth"]}
            flat |= {"system": said["system"]} if "system" in said else {}
            flat |= {"demonstration": row["target"][0]["content"]} if row.get("target") else {}
        except (KeyError, TypeError, IndexError) as error:
            raise SystemExit(f"error: {where}: 'prompt' is a list, but the row lacks the layout of Elliott/Openr1-Math-46k-8192: "
                             "'prompt' and 'target' lists of messages {role, content}, reward_model.ground_truth "
                             f"({type(error).__name__}: {error})") from error
    for key in ("prompt", "answer") + ("demonstration",) * need_demonstration:
        if key not in flat:
            reason = "; this method trains on demonstrations" if key == "demonstration" else ""
            raise SystemExit(f"error: {where}: no '{key}' (it has: {', '.join(row)}){reason}")
        texts = flat[key] if key == "answer" and isinstance(flat[key], list) and flat[key] else [flat[key]]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise SystemExit(f"error: {where}: '{key}' must be a string that is not empty{' (or a list of them)' * (key == 'answer')}, "
                             f"not {flat[key]!r:.60}")
    kept = {key: flat[key] for key in ("prompt", "answer", *("demonstration",) * need_demonstration, "system", "level")
            if flat.get(key) is not None}
    level = kept.get("level", 0)
    if not isinstance(level, (str, int, float)) or isinstance(level, bool) or level != level or level == "all":
        raise SystemExit(f"error: {where}: 'level' must be a number or a string, and not 'all', not {level!r:.60}")
    try:
        json.dumps(kept, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SystemExit(f"error: {where}: half of a surrogate pair, which is no character: {error}") from error
    return kept


def load_config_and_tokenizer(model, rope_theta=None, max_position_embeddings=None):
    """(HF config, tokenizer) of a directory or hub id, with the overrides applied, or SystemExit with one sentence."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --model {model}: neither a Hugging Face model directory here nor a model that the "
                         f"hub gives: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"error: --model {model}: its tokenizer has no end-of-sequence token")
    if not tokenizer.encode("1+1", add_special_tokens=False):
        raise SystemExit(f"error: --model {model}: its tokenizer is empty: are tokenizer.json and tokenizer_config.json there?")
    if rope_theta is not None and "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
        raise SystemExit(f"error: --rope-theta: a {config.model_type} model has no single rope_theta")
    return override(config, rope_theta, max_position_embeddings), tokenizer


def override(config, rope_theta=None, max_position_embeddings=None):
    """Change an HF config in place, return it; the trainer and the sampler both call this on what they read.

    Dropout is switched off: pi_theta must be one function of its weights, in the sampler, in pi_old and in the update.
    """
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    if rope_theta is not None and hasattr(config, "rope_parameters"):  # vLLM also calls this on a bare PreTrainedConfig
        config.rope_parameters = config.rope_parameters | {"rope_theta": rope_theta}
    return config


def check_weights(model, config):
    """SystemExit with one sentence unless the weights of a local model directory are whole and fit its config."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM
    files = sorted(Path(model).glob("*.safetensors"))
    if not Path(model).is_dir() or not files and any(Path(model).glob("*.bin")):
        return  # the hub and torch check theirs
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise SystemExit(f"error: --model {model}: {file.name} is broken: {error}") from error
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    for name in wanted:  # a checkpoint in which no name is known is left to transformers, which knows older layouts
        if not files or shapes.keys() & wanted.keys() and shapes.get(name) != wanted[name]:
            has = f"{name} has shape {shapes[name]}" if name in shapes else f"has no {name}"
            raise SystemExit(f"error: --model {model}: the weights {has}, its config.json asks for {wanted[name]}"
                             if files else f"error: --model {model}: no .safetensors or .bin file there")


def check_context(config, prompt_tokens, max_response_tokens):
    """SystemExit unless a prompt of that many tokens and a response together fit the model's positions."""
    need, have = prompt_tokens + max_response_tokens, getattr(config, "max_position_embeddings", math.inf)
    if need > have:
        raise SystemExit(f"error: prompts of up to {prompt_tokens} tokens and --max-response-tokens {max_response_tokens} need {need} "
                         f"positions, the model has {have}: lower the latter, or raise the model's with --max-position-embeddings "
                         "(and --rope-theta)")


def render(problem, tokenizer, template="chat", system=SYSTEM):
    """The prompt as text, up to where the response begins.

    template: "chat", the tokenizer's own chat template with `system` as system message ("" for none, "data" for the
    problem's own), or "plain", the form that the paper uses for Llama-3.1-8B.
    """
    if template == "plain":
        return PLAIN.replace("{prompt}", problem["prompt"])
    if not tokenizer.chat_template:
        raise SystemExit(f"error: --model {tokenizer.name_or_path}: its tokenizer has no chat template: use --template plain")
    system = problem.get("system", "") if system == "data" else system
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": problem["prompt"]}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if not text.strip():
            raise ValueError("it makes nothing of it")
    except Exception as error:  # a template is a program, and the model's
        raise SystemExit(f"error: the model's chat template refuses this conversation: {error}; where it knows no "
                         "system message, use --system-prompt '' (or --template plain)") from error
    return text


def tokenize(problems, tokenizer, template, system, max_prompt_tokens, max_response_tokens):
    """Add "prompt_ids" and, where there is a demonstration, "demo_ids" to each problem; leave out what does not fit.

    Prompt and demonstration are tokenised apart and concatenated, as at sampling time; the demonstration ends in the
    end-of-sequence token. Returns (problems that fit, number with too long a prompt, number with too long a
    demonstration): nothing is cut, since a cut demonstration teaches never to stop.
    """
    texts = [render(problem, tokenizer, template, system) for problem in problems]
    prompts = tokenizer(texts, add_special_tokens=template == "plain")["input_ids"]  # a chat template writes its own
    demos = tokenizer([p.get("demonstration", "") for p in problems], add_special_tokens=False)["input_ids"]
    kept, long_prompts, long_demos = [], 0, 0
    for problem, prompt_ids, demo_ids in zip(problems, prompts, demos, strict=True):
        has_demo = "demonstration" in problem
        if len(prompt_ids) > max_prompt_tokens:
            long_prompts += 1
        elif has_demo and len(demo_ids) + 1 > max_response_tokens:
            long_demos += 1
        else:
            demo = {"demo_ids": demo_ids + [tokenizer.eos_token_id]} if has_demo else {}
            kept.append(problem | {"prompt_ids": prompt_ids} | demo)
    return kept, long_prompts, long_demos
