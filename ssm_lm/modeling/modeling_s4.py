"""S4Model, S4ForCausalLM and S4ForSequenceClassification: sequence models whose mixers are state spaces.

embedding -> num_hidden_layers x [sublayers of config.arch] -> norm -> head
sublayer:  x + dropout(f(norm(x))), f one of mixers.py or of feed_forwards.py

Packed documents: with `seq_idx`, or with position_ids that start again at 0, the states do too; see documents.py.
"""

import inspect
from functools import wraps

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax, tied_keys
from .blocks import S4Block
from .cache_s4 import check_holds_states  # whose import registers the "s4" cache layer
from .configuration_s4 import S4Config
from .decoding_common import CACHE_FIELD, cache_of
from .decoding_s4 import STRATEGIES
from .decoding_sampling import READY, sample, serves
from .documents import find_documents, from_position_ids, from_starts
from .losses import LanguageModelHead, average, causal_targets, kept_positions
from .native_step import logits as native_logits
from .native_step import program_of, programs_of
from .native_step import run as native_step
from .norms_and_dropout import make_norm
from .short_convolution import ShortConvolution
from .ssm import StateSpace


class S4PreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers asks of a model class."""

    config: S4Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["S4Block"]
    _skip_keys_device_placement = ["past_key_values"]
    # substrings of parameter names: everything in a state space stays float32 when a checkpoint loads in half precision
    _keep_in_fp32_modules_strict = ["ssm"]
    _is_stateful = False  # transformers: whether a state could not be cropped; see S4CacheLayer.crop
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": S4Block}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (StateSpace, ShortConvolution)):
            # init.copy_ leaves alone what was loaded from a checkpoint
            for name, value in module.initial_values().items():
                parameter = getattr(module, name)
                init.copy_(parameter, value.to(parameter.dtype))
        elif isinstance(module, (AdaptiveEmbedding, AdaptiveSoftmax)):
            module.init_parameters(init)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone: those of the state spaces. It would pull log dt
        and Lambda towards 0, which is not neutral for them. transformers' Trainer decays everything but biases and
        norms: there, override get_decay_parameter_names with what it returned less these.
        """
        spaces = [(path, module) for path, module in self.named_modules() if isinstance(module, StateSpace)]
        return {f"{path}.{name}" for path, module in spaces for name, _ in module.named_parameters()}

    def set_input_embeddings(self, value):
        if self.config.adaptive_cutoffs is not None and not isinstance(value, AdaptiveEmbedding):
            raise ValueError(
                f"the embedding of an adaptive model is an AdaptiveEmbedding, not {type(value).__name__}: the softmax "
                "shares its clusters"
            )
        super().set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers; NotImplementedError for an adaptive model, whose clusters are part of its design."""
        if self.config.adaptive_cutoffs is None:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens not in (None, self.config.vocab_size) or pad_to_multiple_of is not None:
            raise NotImplementedError(
                "an adaptive embedding cannot be resized: its clusters follow the frequencies of the vocabulary "
                f"(adaptive_cutoffs {list(self.config.adaptive_cutoffs)}); build a model with another vocab_size"
            )
        return self.get_input_embeddings()


class S4Model(S4PreTrainedModel):
    """The backbone: token ids or embeddings in, the normalised last hidden states out."""

    def __init__(self, config: S4Config):
        super().__init__(config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        if config.input_size is not None:  # the input is continuous: no tokens
            self.embed_tokens, self.encoder = None, nn.Linear(config.input_size, config.hidden_size)
        elif config.adaptive_cutoffs is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        else:
            self.embed_tokens = AdaptiveEmbedding(
                config.vocab_size,
                config.hidden_size,
                config.adaptive_cutoffs,
                config.adaptive_div_val,
                config.embedding_dropout,
            )
            self.embedding_dropout = nn.Identity()  # the recipe drops entries of the narrow vectors, in there
        self.layers = nn.ModuleList([S4Block(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """input_ids (B, L) or inputs_embeds (B, L, H); attention_mask (B, L or more), 0 where a token is padding.

        past_key_values: a cache from an earlier forward; the sequence goes on from its state. With use_cache the
        output holds the cache, made here where none was given. cache: another name of it, which generate() of
        transformers 5.24 says; unheard, every token would begin from a zero state.
        seq_idx: (B, L), the document of each token, negative for padding: states are zero where it changes. The first
        document of a row goes on from the cache, where there is one. Without it, position_ids (B, L) that start again
        at 0 say the same; they are looked at only where no past_key_values are given. So does cu_seq_lens_q, where each
        document of the one row begins and the last one ends, which goes before them. All of these wait for the device
        once a forward, to learn how many chunks the documents fill.
        With config.input_size, inputs_embeds is (B, L, input_size). A bidirectional model has no cache.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if self.config.input_size is not None:
            if inputs_embeds is None:
                raise ValueError("a model with input_size takes inputs_embeds (batch, length, input_size)")
            inputs_embeds = self.encoder(inputs_embeds)
        elif inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.bidirectional:
            if past_key_values is not None:
                raise ValueError("a bidirectional model reads from both ends: it takes no past_key_values")
            use_cache = False
        if seq_idx is None and cu_seq_lens_q is not None:
            seq_idx = from_starts(cu_seq_lens_q, *inputs_embeds.shape[:2])
        elif seq_idx is None and position_ids is not None and past_key_values is None:
            seq_idx = from_position_ids(position_ids, attention_mask, len(inputs_embeds))
        documents = None if seq_idx is None else find_documents(seq_idx, self.config.chunk_size)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            check_holds_states(past_key_values, len(self.layers))
        attention_mask = padding_mask(self.config, inputs_embeds, attention_mask)
        recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if documents is None and past_key_values is not None and not recorded:
            hidden_states = native_step(self, inputs_embeds, past_key_values, attention_mask)
            if hidden_states is not None:
                return BaseModelOutputWithPast(hidden_states, past_key_values if use_cache else None)
        hidden_states = self.embedding_dropout(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                documents=documents,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values if use_cache else None)


class S4ForCausalLM(S4PreTrainedModel, GenerationMixin):
    """S4Model with a head over the vocabulary, linear or adaptive, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: S4Config):
        super().__init__(config)
        if config.bidirectional or config.input_size is not None:
            raise ValueError(
                "S4ForCausalLM predicts the next token from those before it: bidirectional must be false, and "
                "input_size, which is for continuous inputs, must be left out"
            )
        self.model = S4Model(config)
        self.vocab_size = config.vocab_size
        if config.adaptive_cutoffs is None:
            self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_head = AdaptiveSoftmax(
                config.vocab_size,
                config.hidden_size,
                config.adaptive_cutoffs,
                config.adaptive_div_val,
                config.head_dropout,
            )
            self._tied_weights_keys = tied_keys(len(self.lm_head.bounds), config.adaptive_tie_projections)
            self._tp_plan = {}  # a slice of a cluster does not give log-probabilities
        self.lm_head.kernels = config.kernels
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, **kwargs):
        """No mask where a step decodes: one that grows with every token would recompile a compiled step each time."""
        return padding_mask(config, inputs_embeds, attention_mask)

    @property
    def strategies(self) -> dict:
        """Further decoding methods for `generate(custom_generate=...)`, by name; see decoding_s4.py."""
        return dict(STRATEGIES)

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        with programs_of(self.model).unchanged():
            return super().generate(*args, **kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        """A callable that takes a streamer or a tokenizer gets it; transformers would drop both, and whoever reads from
        the streamer would wait for ever.
        """
        given = {"streamer": streamer, "tokenizer": kwargs.get("tokenizer")}
        extracted = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        if callable(custom_generate):
            known = inspect.signature(custom_generate).parameters
            extracted |= {name: value for name, value in given.items() if value is not None and name in known}
            if streamer is not None and "streamer" not in known:
                raise ValueError("this custom_generate cannot stream: leave the streamer out")
        return extracted

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        """transformers' loop of greedy search and sampling, or where it does the same, the short one."""
        shared = input_ids, logits_processor, stopping_criteria, generation_config
        if type(self) is S4ForCausalLM and serves(self, input_ids, generation_config, synced_gpus, kwargs):
            return sample(self, *shared, streamer, **kwargs)
        return super()._sample(*shared, synced_gpus, streamer, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """Where steps are in C, a token that follows is handed on as it is: to look for positions, masks and names in
        signatures, as transformers does, takes as long as a twentieth of such a step. inputs_embeds are the prompt's
        alone; generate() takes them where it finds their name in this signature.
        """
        if next_sequence_length == 1 and kwargs.keys() <= READY and program_of(self.model, cache_of(kwargs), 1):
            return {"input_ids": input_ids[:, -1:].contiguous(), **kwargs}
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    def _get_static_cache_init_shape(self):
        return None  # there are no heads to size a static cache by: its layers wait for their first state

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As S4Model.forward, seq_idx and position_ids included (generate() would fill in position_ids if they were
        named here); labels (B, L) as input_ids, -100 where no loss is wanted (the shift is done here);
        logits_to_keep: how many of the last positions get logits (0: all), or which.
        skip_logits: True: the loss alone, without holding (B, L, V), and logits None in the output; None: so in
            training mode where labels are given and the config has loss_chunk_size or adaptive_cutoffs.
        The logits of an adaptive model are log-probabilities.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states, past_key_values = outputs.last_hidden_state, getattr(outputs, CACHE_FIELD)
        adaptive = self.config.adaptive_cutoffs is not None
        if skip_logits is None:
            skip_logits = self.training and (adaptive or self.config.loss_chunk_size is not None)
            skip_logits = skip_logits and labels is not None
        elif skip_logits and labels is None:
            raise ValueError("skip_logits leaves only the loss, and there is none without labels")
        logits = None if skip_logits else self._logits(kept_positions(hidden_states, logits_to_keep), past_key_values)
        loss = None
        if labels is not None and (skip_logits or adaptive):
            loss = self.loss_without_logits(hidden_states, labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, past_key_values, outputs.hidden_states)

    def _logits(self, hidden_states, past_key_values):
        logits = native_logits(self.model, self.lm_head, hidden_states, past_key_values)
        return self.lm_head(hidden_states) if logits is None else logits

    def loss_without_logits(self, hidden_states, labels, num_items_in_batch=None, shift_labels=None, **kwargs):
        """The causal loss of transformers (its arguments and its meaning) from hidden states (B, L, H)."""
        if not isinstance(self.lm_head, (LanguageModelHead, AdaptiveSoftmax)):
            # an adapter, a quantizer or a resize has put its own module there, of which only the logits are known
            shared = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
            logits = self.lm_head(hidden_states)
            return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **shared)
        targets = causal_targets(labels, shift_labels).to(hidden_states.device)
        summed = self.lm_head(hidden_states.flatten(0, 1), targets, self.config.loss_chunk_size)
        return average(summed, targets, num_items_in_batch)


class S4ForSequenceClassification(S4PreTrainedModel):
    """S4Model, pooled over the sequence, with a linear classifier: for tokens or, with config.input_size, for
    continuous inputs; bidirectional or not.
    """

    accepts_loss_kwargs = False  # its loss is a mean over the batch: the Trainer is to average over batches and ranks

    def __init__(self, config: S4Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = S4Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """As S4Model.forward, without a cache; padding may be on either side. Without an attention_mask, tokens that
        are config.pad_token_id are padding. labels (B,) classes, (B,) or (B, num_labels) numbers for a regression,
        (B, num_labels) of 0 and 1 for several labels at once: config.problem_type, or what their type says.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **(kwargs | {"use_cache": False}),
        )
        logits = self.score(pool(outputs.last_hidden_state, attention_mask, self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def padding_mask(config: S4Config, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None):
    """The mask (B, L) of the tokens at hand, None where none of them is padding or the mask is not (B, L or more).

    transformers' own function takes a token that comes alone for one that was generated, which is never padding. It
    may be of a prompt that is read token by token, or of a row that waits for the others: that drives no state either.
    """
    alone = attention_mask is not None and attention_mask.dim() == 2 and inputs_embeds.shape[1] == 1
    if alone and not is_tracing(attention_mask) and not attention_mask[:, -1].all():
        return attention_mask[:, -1:].contiguous()
    return create_recurrent_attention_mask(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask)


def pool(hidden_states: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """(B, L, H) -> (B, H): mean, max or last over the positions where mask (B, L) is not 0; all of them without one."""
    if mask is None:
        mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    mask = mask.bool()
    if pooling == "last":
        index = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, index, -1).argmax(-1)
        return hidden_states[torch.arange(len(mask), device=mask.device), last]
    if pooling == "max":
        return hidden_states.masked_fill(~mask[..., None], torch.finfo(hidden_states.dtype).min).amax(1)
    accumulate = torch.promote_types(hidden_states.dtype, torch.float32)
    total = hidden_states.masked_fill(~mask[..., None], 0).sum(1, dtype=accumulate)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


# each model, the Auto class of transformers that makes it, and that class's table of names: transformers decides by the
# names which models shift their labels, and its Trainer smooths unshifted ones without
MODELS = (
    (S4Model, "AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
    (S4ForCausalLM, "AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        S4ForSequenceClassification,
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
)
for _model, _, _names in MODELS:
    _names.setdefault(S4Config.model_type, _model.__name__)
