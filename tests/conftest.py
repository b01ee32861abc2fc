"""The tests are for CPUs: where there are GPUs, they are hidden, else the trainer would take them.

tools/check_gpu.py is what looks at GPUs.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
