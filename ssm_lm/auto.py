"""Registers the models with transformers' Auto classes; importing this module does it.

And the other way round: `save_pretrained` of these classes writes their code beside the weights and says in
config.json which class is which, so that the folder loads with trust_remote_code=True where ssm_lm is not installed.
"""

import transformers

from .modeling import modeling_s4
from .modeling.configuration_s4 import S4Config

# what config.json says: the Auto class -> the file of the model's code and the class in it
AUTO_MAP = {"AutoConfig": "configuration_s4.S4Config"}

transformers.AutoConfig.register(S4Config.model_type, S4Config, exist_ok=True)
S4Config.register_for_auto_class()
for model, auto_class, _ in modeling_s4.MODELS:
    getattr(transformers, auto_class).register(S4Config, model, exist_ok=True)
    model.register_for_auto_class(auto_class)
    AUTO_MAP[auto_class] = f"modeling_s4.{model.__name__}"
