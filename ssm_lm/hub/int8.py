"""A model whose projections are held in int8: `ssm-lm export --int8`.

torchao's weight-only form: each row of a projection as int8 with a scale of its own, multiplied in the dtype of the
signal. Embeddings, the head, norms, convolutions and all of the state spaces stay as they are. What is saved is a
folder of transformers, which loads it as it was saved wherever torchao is installed.
"""

import tempfile

from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from ..loading.folder import quiet

VERSION = 2  # of torchao's tensors in files; the first cannot be written to safetensors


def quantised(model):
    """A language model of this package -> the same with its projections in int8, on the CPU.

    transformers quantises what it loads, and remembers it for `save_pretrained`; so the model goes through a folder.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        settings = TorchAoConfig(Int8WeightOnlyConfig(version=VERSION))
        return type(model).from_pretrained(folder, dtype="auto", device_map="cpu", quantization_config=settings).eval()
