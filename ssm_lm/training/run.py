"""`ssm-lm train CONFIG.yaml [--key value ...]`: from a config to a trained model.

The same command is one process, one rank under torchrun, and one rank under the deepspeed launcher. Called again with
the same config it goes on from the last whole checkpoint, or says that the run is finished.
"""

import argparse
from pathlib import Path

from ..errors import UserError
from ..files import write_json
from .config import model_keys, parse_overrides, read_train_config
from .environment import default_environment, is_main_process, on_cpu, prepare_process, set_threads, world_size

# what may differ when a run is resumed, because it changes the speed and not the result
SPEED_KEYS = ("mode", "chunk_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file; see configs/train/")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="--key value for any key of the config; --model.key value for a key of the model",
    )


def run(args: argparse.Namespace) -> None:
    train(read_train_config(args.config, parse_overrides(args.overrides)), where=args.config)


def train(values: dict, where: str = "config") -> Path:
    """Train as a checked config says (see `config.read_train_config`); returns the folder of the finished model.

    The folder holds the model and its tokenizer, checkpoint-N folders, and TensorBoard files in runs/.
    Raises UserError, before anything is written, for whatever the config or the folders have wrong.
    """
    for key in ("data", "output_dir"):
        if not values.get(key):
            raise UserError(f"{where}: the key {key!r} is needed")
    if bool(values["model"]) == bool(values.get("init_from")):
        raise UserError(f"{where}: exactly one of 'model' and 'init_from' is needed")
    for key, least in (("sequence_length", 2), ("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1)):
        if values.get(key, least) < least:
            raise UserError(f"{where}: {key} must be at least {least}, not {values[key]}")
    if values.get("carry_state") and (values.get("activation_checkpointing") or values.get("gradient_checkpointing")):
        raise UserError(
            f"{where}: carry_state and activation_checkpointing exclude each other (the recomputed forward would go on "
            "from the state that it is to make); set one of them to false"
        )
    prepare_process(uses_deepspeed=values.get("deepspeed") is not None)

    from transformers import set_seed

    from ..data.stream import TokenStream
    from ..data.tokenizer import load_tokenizer
    from ..data.windows import TokenWindows, WindowSampler
    from ..modeling.modeling_s4 import S4ForCausalLM
    from .arguments import S4TrainingArguments
    from .checkpoints import RUN_FILE, check_resumable, claim, last_complete_checkpoint
    from .precision import deepspeed_config
    from .trainer import S4Trainer

    # ---- everything that can be wrong, before the first file is written
    stream = TokenStream.open(values["data"], "train")
    tokenizer = load_tokenizer(str(Path(values["data"]) / "tokenizer"))
    if values.get("init_from"):
        from ..hub.load import load_model

        model = load_model(values["init_from"])
        config = model.config
    else:
        model, config = None, model_config(values["model"], stream, tokenizer, where)
    stream.check_vocabulary(config.vocab_size, "the model")
    length = values.get("sequence_length", S4TrainingArguments.sequence_length)
    train_windows = TokenWindows(stream, length)
    windows_per_epoch = len(WindowSampler(train_windows))
    eval_windows = None
    if values.get("eval_strategy", "no") != "no":
        eval_windows = TokenWindows(TokenStream.open(values["data"], "validation"), length)

    output_dir = Path(values["output_dir"])
    arguments = {key: value for key, value in values.items() if key not in ("model", "init_from")}
    arguments["deepspeed"] = deepspeed_config(
        values.get("deepspeed"), values.get("bf16", False), values.get("fp16", False)
    )
    if arguments["deepspeed"]:
        arguments["bf16"] = False  # it is torch_autocast there
    if on_cpu():
        arguments["use_cpu"] = True
    identity = run_identity(values, config, stream)
    recorded = claim(output_dir, identity)
    checkpoint = values.get("resume_from_checkpoint") or last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        check_resumable(Path(checkpoint), world_size(), sharded=bool(arguments["deepspeed"]))
    try:
        args = S4TrainingArguments(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    if args.max_steps <= 0:
        args.max_steps = max(1, int(args.num_train_epochs * windows_per_epoch // args.global_batch_size))
    if recorded.get("finished_step", -1) >= args.max_steps:
        if is_main_process():
            print(f"{output_dir}: this run is finished ({recorded['finished_step']} steps); nothing to do")
        return output_dir

    # ---- train
    set_threads()
    set_seed(args.seed)
    if model is None:
        model = S4ForCausalLM(config)
    if is_main_process():
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / RUN_FILE, recorded | {"identity": identity})
        except OSError as error:
            raise UserError(f"output_dir {output_dir} cannot be written to ({error.strerror or error})") from error
        print_plan(args, model, stream, checkpoint)
    # transformers' own default is a new folder at every start, which would cut a resumed curve in two
    with default_environment("TENSORBOARD_LOGGING_DIR", str(output_dir / "runs")) as tensorboard_folder:
        trainer = S4Trainer(model, args, train_windows, eval_windows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(output_dir))
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        write_json(output_dir / RUN_FILE, {"identity": identity, "finished_step": trainer.state.global_step})
        print(f"model        {output_dir}\ntensorboard  tensorboard --logdir {tensorboard_folder}")
    trainer.accelerator.end_training()
    return output_dir


def model_config(keys: dict, stream, tokenizer, where: str):
    """S4Config from the keys of a config; vocabulary and special tokens from the data where they are not given."""
    from huggingface_hub.errors import StrictDataclassError

    from ..modeling.configuration_s4 import S4Config

    eos = stream.eos_token_id
    data = {"vocab_size": stream.vocab_size, "eos_token_id": eos, "bos_token_id": eos}
    data["pad_token_id"] = tokenizer.pad_token_id
    try:
        return S4Config(**(data | keys))
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        raise UserError(f"{where}: model: {reason}") from error


def run_identity(values: dict, config, stream) -> dict:
    """What makes this run this run: two configs with the same identity may share an output folder."""
    from .arguments import S4TrainingArguments

    model = {key: getattr(config, key) for key in model_keys() if key not in SPEED_KEYS}
    keys = ("sequence_length", "carry_state", "seed", "learning_rate", "ssm_learning_rate", "weight_decay", "init_from")
    training = {key: values.get(key, getattr(S4TrainingArguments, key)) for key in keys}
    return {"model": model, "data": stream.fingerprint, **training}


def print_plan(args, model, stream, checkpoint) -> None:
    """What is about to run, resolved."""
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    stage = args.deepspeed["zero_optimization"]["stage"] if args.deepspeed else None
    engine = "torch" if stage is None else f"DeepSpeed ZeRO {stage}"
    precision = "bfloat16 (autocast)" if args.bf16 or (args.deepspeed or {}).get("torch_autocast") else "float32"
    print(
        f"model     {parameters:,} parameters: {config.num_hidden_layers} x [{', '.join(config.sublayers)}], "
        f"{config.ssm}, hidden_size {config.hidden_size}, state_size {config.state_size}\n"
        f"data      {len(stream.tokens):,} tokens, vocabulary {stream.vocab_size}\n"
        f"step      {args.global_batch_size} windows of {args.sequence_length} = {args.tokens_per_step:,} tokens "
        f"({args.world_size} ranks x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        f"accumulated), {args.max_steps} steps\n"
        f"engine    {engine}, {precision}, {args.device}",
        flush=True,
    )
    if checkpoint is not None:
        print(f"resuming  {checkpoint}", flush=True)
