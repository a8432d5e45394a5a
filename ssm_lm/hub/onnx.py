"""`ssm-lm export --format onnx`: two graphs that onnxruntime runs, where there is neither torch nor ssm_lm.

    step.onnx       one token a row:         input_ids (B, 1)
    prefill.onnx    a chunk of a prompt:     input_ids (B, T), T the model's chunk_size

Both take any batch, and the states before their tokens; both return the logits after the last one (B, V) and the states
after it. A prompt is as many chunks as it has, then steps; so one that is read from states goes on from them alike.
"""

import logging
import warnings
from pathlib import Path

import torch

from ..errors import UserError
from ..extras import need
from ..loading.folder import quiet
from .graphs import StatesInAndOut, derived_once

GRAPHS = ("prefill", "step")


def write_graphs(model, folder: Path) -> None:
    """Write both graphs of a language model into `folder`; float32, on the CPU. Raises UserError for one of another
    dtype.
    """
    need("--format onnx", "onnx", "onnx", "onnxscript")
    if model.dtype != torch.float32:
        raise UserError(f"--format onnx: writes float32, and the weights are {model.dtype}; add --dtype float32")
    graph = StatesInAndOut(model.cpu().eval().requires_grad_(False), last_only=True)
    for name, length in zip(GRAPHS, (model.config.chunk_size, 1), strict=True):
        with derived_once(graph, length), quiet(), _silent():
            example = torch.zeros(2, length, dtype=torch.long), graph.first_states(2)
            program = torch.onnx.export(
                torch.export.export(graph, example, dynamic_shapes=graph.dynamic_shapes()),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", *graph.state_names()],
                output_names=["logits", *(f"next_{name}" for name in graph.state_names())],
                custom_translation_table={torch.ops.aten.softplus.default: _softplus},
            )
            program.save(folder / f"{name}.onnx")


def _softplus(x, beta=1.0, threshold=20.0):
    """max(x, 0) + log(1 + exp(-|x|)): onnxruntime has no Softplus of float64, in which an SSD chooses its steps."""
    from onnxscript import opset18 as op

    one = op.CastLike(1.0, x)
    return op.Add(op.Relu(x), op.Log(op.Add(one, op.Exp(op.Neg(op.Abs(x))))))


class _silent:
    """Without what the exporter says of its own work."""

    def __enter__(self):
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *exception):
        logging.disable(logging.NOTSET)
        return self.caught.__exit__(*exception)


README = """---
library_name: onnxruntime
pipeline_tag: text-generation
---

# {name}

A state space language model, {parameters:,} parameters, as two ONNX graphs, written by `ssm-lm export --format onnx`.
`prefill.onnx` reads {chunk} tokens a call, `step.onnx` one; both take and return the states, float32, all zero before a
text begins, of constant size however long it grows. Any batch.

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

prefill, step = (onnxruntime.InferenceSession(f"{{name}}.onnx") for name in ("prefill", "step"))
tokenizer = Tokenizer.from_file("tokenizer.json")
states = {{x.name: np.zeros([1, *x.shape[1:]], np.float32) for x in step.get_inputs()[1:]}}


def run(graph, ids):
    logits, *after = graph.run(None, {{"input_ids": np.array([ids]), **states}})
    states.update(zip(states, after))
    return logits[0]


ids = tokenizer.encode("The function returns", add_special_tokens=False).ids
whole = len(ids) // {chunk} * {chunk}
for start in range(0, whole, {chunk}):
    logits = run(prefill, ids[start : start + {chunk}])
for token in ids[whole:]:
    logits = run(step, [token])
for _ in range(20):
    ids.append(int(logits.argmax()))
    logits = run(step, [ids[-1]])
print(tokenizer.decode(ids))
```
"""


def readme(model, name: str) -> str:
    """How to run the graphs, for the folder."""
    return README.format(name=name, parameters=model.num_parameters(), chunk=model.config.chunk_size)
