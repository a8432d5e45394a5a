"""The tasks of lm-evaluation-harness (lm_eval), scored by a model that has a state instead of a context window.

`lm_eval --model hf` runs an exported model too, and cuts a long document into windows that know nothing of each other.
Here the state is carried over them, so a document's likelihood is that of the whole document, and no context of a
request is cut short.
"""

import json
from collections.abc import Sequence

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from ..errors import UserError, one_line
from .perplexity import full_context_nll

# there is no longest input; this bounds what lm_eval computes from one
UNLIMITED = 1 << 24
# what `--model-args` may say of the arguments of HFLM: those that still mean something for a model that is loaded
MODEL_ARGS = ("max_length", "prefix_token_id", "add_bos_token", "truncation", "logits_cache", "softmax_dtype")


class RecurrentLM(HFLM):
    """lm_eval's adapter around an S4ForCausalLM and its tokenizer, both loaded.

    window: tokens a forward of a rolling log-likelihood; it bounds the memory and changes no result.
    The other arguments are those of HFLM that MODEL_ARGS names. max_length, for a test of shorter contexts, cuts those
    of loglikelihood and generate_until, as for every model; rolling ones are whole.
    """

    def __init__(self, model, tokenizer, batch_size: int = 8, window: int = 4096, **kwargs):
        self.window = window
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            **({"max_length": UNLIMITED} | kwargs),
        )

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text; UserError where nothing can."""
        return self._special_token(self.custom_prefix_token_id, "bos_token_id", "eos_token_id")

    @property
    def eot_token_id(self) -> int:
        """What ends a generated text."""
        return self._special_token(None, "eos_token_id", "bos_token_id")

    def _special_token(self, chosen: int | None, *names: str) -> int:
        """`chosen`, or the first that the tokenizer, or else the config, has; a list of them counts by its first."""
        found = [getattr(source, name, None) for source in (self.tokenizer, self.config) for name in names]
        for value in (chosen, *found):
            value = value[0] if isinstance(value, Sequence) and value else value
            if isinstance(value, int):
                return value
        raise UserError(
            "neither the tokenizer nor the config has a bos or an eos token to begin a text with; "
            "name one with --model-args prefix_token_id=N"
        )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p(document | prefix token) of every request, each in one pass with the state carried through."""
        results = []
        for request in requests:
            (text,) = request.args
            tokens = np.asarray(self.tok_encode(text), dtype=np.int64)
            results.append(-full_context_nll(self.model, tokens, self.prefix_token_id, self.window))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results


class _Tasks(TaskManager):
    def load(self, task_list):
        try:
            return super().load(task_list)
        except Exception as error:  # of YAML, of a task's own code, of datasets and of the network under it
            raise UserError(f"--tasks {','.join(task_list)}: cannot be loaded ({one_line(error)})") from error


def parse_model_args(text: str | None) -> dict:
    """--model-args "key=value,..." as keyword arguments of RecurrentLM; UserError for a key that is not one."""
    values = simple_parse_args_string(text)
    unknown = values.keys() - set(MODEL_ARGS)
    if unknown:
        raise UserError(f"--model-args: unknown key {min(unknown)!r}; choose from {', '.join(MODEL_ARGS)}")
    for key in ("max_length", "prefix_token_id"):
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < (key == "max_length"):
            raise UserError(f"--model-args: {key} must be a number, not {value!r}")
    return values


def evaluate_tasks(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    window: int = 4096,
    model_args: str | None = None,
) -> tuple[dict, dict]:
    """(the values of the JSON file, lm_eval's own results) of the tasks.

    include_path: a folder with more task files; a task file may name code, which is run. limit: documents a task.
    Raises UserError for a task that is not known or cannot be loaded.
    """
    for include_defaults in (False, True):  # to index the thousands that come with lm_eval takes ten seconds
        manager = _Tasks(include_path=include_path, include_defaults=include_defaults)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            break
    if unknown:
        raise UserError(f"--tasks {unknown[0]}: lm_eval has no such task; is its file in --include-path?")
    arguments = parse_model_args(model_args)
    if arguments.get("prefix_token_id", 0) >= model.config.vocab_size:
        raise UserError(f"--model-args: prefix_token_id must be below the vocabulary's {model.config.vocab_size}")
    adapter = RecurrentLM(model, tokenizer, batch_size, window, **arguments)
    found = simple_evaluate(
        adapter,
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
        bootstrap_iters=1000,
    )
    values = {
        "tasks": found["results"],
        "samples": found["n-samples"],
        "fewshot": found["n-shot"],
        "versions": found["versions"],
        "protocol": "lm_eval, state carried over rolling windows",
        "limit": limit,
    }
    # numpy's numbers, and NaN where a standard error has too few documents
    return json.loads(json.dumps(values, default=str), parse_constant=lambda name: None), found
