"""What the programs share. Importing it keeps libraries from sending usage statistics."""

import os

# vLLM and huggingface_hub read this when they are imported, which is later.
os.environ.setdefault("DO_NOT_TRACK", "1")
