"""Registers the models with transformers' Auto classes; importing this module does it.

And the other way round: `save_pretrained` of these classes writes their code beside the weights and says in
config.json which class is which, so that the folder loads with trust_remote_code=True where ssm_lm is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .modeling.configuration_s4 import S4Config
from .modeling.modeling_s4 import S4ForCausalLM, S4ForSequenceClassification, S4Model

AutoConfig.register(S4Config.model_type, S4Config, exist_ok=True)
AutoModel.register(S4Config, S4Model, exist_ok=True)
AutoModelForCausalLM.register(S4Config, S4ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(S4Config, S4ForSequenceClassification, exist_ok=True)

S4Config.register_for_auto_class()
S4Model.register_for_auto_class("AutoModel")
S4ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
S4ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
