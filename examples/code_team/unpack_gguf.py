"""Turn a GGUF file into a folder that vLLM loads: `python unpack_gguf.py FILE FOLDER`.

It runs in a separate process, because it needs the memory of transformers for half a minute only.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
tokenizer.save_pretrained(folder)
model.save_pretrained(folder)
