"""Language models in which a structured state space layer (S4, S4D, S5) replaces attention.

    from ssm_lm import S4Config, S4ForCausalLM

Importing one of these names also registers the classes with transformers' AutoConfig, AutoModel,
AutoModelForCausalLM and AutoModelForSequenceClassification. They are imported on first use, because transformers takes
seconds to import.
"""

import importlib

__version__ = "0.1.0"

__all__ = ["S4Config", "S4ForCausalLM", "S4ForSequenceClassification", "S4Model", "__version__", "register_layer"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module 'ssm_lm' has no attribute {name!r}")
    if name == "register_layer":
        return importlib.import_module(".modeling.ssm", __name__).register_layer
    auto = importlib.import_module(".auto", __name__)
    return getattr(auto.modeling_s4, name)
