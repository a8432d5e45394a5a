"""Registers the models with transformers' Auto classes; importing this module does it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .modeling.configuration_s4 import S4Config
from .modeling.modeling_s4 import S4ForCausalLM, S4ForSequenceClassification, S4Model

AutoConfig.register(S4Config.model_type, S4Config, exist_ok=True)
AutoModel.register(S4Config, S4Model, exist_ok=True)
AutoModelForCausalLM.register(S4Config, S4ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(S4Config, S4ForSequenceClassification, exist_ok=True)
