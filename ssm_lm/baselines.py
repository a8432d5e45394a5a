"""Models of transformers that the same commands train, evaluate and export: what ours are compared with.

`model: {type: llama, ...}` in a training config names one, and the other keys are those of its own config class.
Nothing of them is ours: the classes, their initialisation and the folders that they are saved to are transformers'.
"""

# type -> (the config's class, the language model's)
BASELINES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mamba": ("MambaConfig", "MambaForCausalLM"),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM"),
}
# modules whose own parameters (A_log, D, dt_bias) are those of a state space
STATE_SPACES = ("MambaMixer", "Mamba2Mixer")


def is_baseline(config) -> bool:
    """Whether a model's config is that of a baseline."""
    return config.model_type in BASELINES


def baseline_classes(kind: str) -> tuple[type, type]:
    """(the config's class, the language model's) of a type."""
    import transformers  # late: reading a config needs the names alone

    return tuple(getattr(transformers, name) for name in BASELINES[kind])


def longest_sequence(config) -> int | None:
    """The most tokens that a baseline reads at once; None where its class sets no limit."""
    return config.n_positions if config.model_type == "gpt2" else None  # it learns an embedding of every position
