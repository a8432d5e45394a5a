"""transformers' own common model tests, on the S4 classes. run.py puts this file into a copy of their tests/ tree as
tests/models/s4/test_modeling_s4.py and runs it there; on its own it cannot be imported.

S4_CONFORMANCE is a JSON object of S4Config keys for the tests' tiny configuration: {"ssm": "s5", "arch": "s4-ffn"}.
"""

import json
import os
import unittest

import torch
from transformers.models.auto import modeling_auto

from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification, S4Model  # also registers them with Auto*
from ssm_lm.modeling.configuration_s4 import STATES

from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from ...test_configuration_common import ConfigTester

OVERRIDES = json.loads(os.environ.get("S4_CONFORMANCE", "{}"))

# the common tests look classes up by name, to know which of them take labels
for table, cls in (
    (modeling_auto.MODEL_MAPPING_NAMES, S4Model),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, S4ForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, S4ForSequenceClassification),
):
    table["s4"] = cls.__name__


class S4ModelTester(CausalLMModelTester):
    config_class = S4Config
    base_model_class = S4Model
    causal_lm_class = S4ForCausalLM
    sequence_classification_class = S4ForSequenceClassification

    def get_config(self):
        config = super().get_config()
        return S4Config(**(config.to_diff_dict() | {"tie_word_embeddings": config.tie_word_embeddings} | OVERRIDES))


class S4ModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = S4ModelTester
    has_attentions = False
    # S4Config came after the date from which every missing weight has to be initialised; the tests look for that date
    # in a copyright line
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        # there are no heads
        self.config_tester = ConfigTester(
            self, config_class=S4Config, common_properties=["hidden_size", "num_hidden_layers"]
        )

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """In place of the shapes of keys and values: those of the states."""
        assert len(past_key_values.layers) == config.num_hidden_layers
        for layer in past_key_values.layers:
            assert len(layer.states) == sum(STATES[kind] for kind in config.sublayers)
            for state in layer.states:
                assert state.dtype == torch.float32
                assert state.shape[0] == batch_size
                assert state.shape[-1] == config.state_size or state.shape[1] == config.conv_size - 1
            assert int(layer.get_seq_length()) == seq_length

    def _check_caches_are_equal(self, cache1, cache2):
        assert len(cache1.layers) == len(cache2.layers)
        for one, other in zip(cache1.layers, cache2.layers, strict=True):
            assert int(one.get_seq_length()) == int(other.get_seq_length())
            for a, b in zip(one.states, other.states, strict=True):
                torch.testing.assert_close(a, b)

    def test_left_padding_compatibility(self):
        """Skipped for models without attention, few of which can do it. This one can."""
        self.has_attentions = True
        super().test_left_padding_compatibility()
