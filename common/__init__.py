"""What the programs share. Importing it keeps other libraries quiet: their errors stay.

What the user has set is kept, so VLLM_LOGGING_LEVEL=INFO shows what vLLM says.
"""

import logging
import os
import sys
import warnings

QUIET = {
    "DO_NOT_TRACK": "1",  # vLLM and huggingface_hub send no statistics of usage
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_LOGS": "-all",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
MODULES = "torch|vllm|transformers|huggingface_hub|datasets|numpy|pydantic|matplotlib"

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
if hasattr(sys.stdout, "reconfigure"):  # a console that is not UTF-8 gets escapes for ± and such
    sys.stdout.reconfigure(errors="backslashreplace")
# A file or a pipe gets no progress bars.
if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")
# vLLM reads its variable when an engine starts; until then this holds.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
if not sys.warnoptions:
    warnings.filterwarnings("ignore", module=rf"({MODULES})(\.|$)")
    for _category in (FutureWarning, SyntaxWarning):  # they are for the libraries' developers
        warnings.filterwarnings("ignore", category=_category)
