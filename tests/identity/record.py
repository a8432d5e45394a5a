"""One side of the comparison: trains, evaluates and generates with the ssm_lm that PYTHONPATH names, and writes the
digests of what came out. It uses the command line and the public names alone, so that it runs on any commit.

    python record.py OUTPUT.json [CASE ...]
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16}

# name -> (keys of the model, keys of the training, ranks)
CASES: dict[str, tuple[dict, dict, int]] = {
    "s4": ({"ssm": "s4"}, {}, 1),
    "s4 legt": ({"ssm": "s4", "ssm_init": "legt", "n_ssm": 2}, {}, 1),
    "s4d": ({"ssm": "s4d"}, {}, 1),
    "s4d bilinear": ({"ssm": "s4d", "discretization": "bilinear", "arch": "s4-ffn", "norm": "rms"}, {}, 1),
    "s4d fft": ({"ssm": "s4d", "mode": "fft"}, {}, 1),
    "s4 fft": ({"ssm": "s4", "mode": "fft"}, {}, 1),
    "s5": ({"ssm": "s5", "ssm_blocks": 2, "glu": "half"}, {}, 1),
    "s5 associative": ({"ssm": "s5", "mode": "associative"}, {}, 1),
    "ssd": ({"ssm": "ssd", "arch": "gated", "expand": 2, "head_dim": 8}, {}, 1),
    "ssd selective": ({"ssm": "ssd", "arch": ["gated", "swiglu"], "selective_dt": True}, {}, 1),
    "h3": ({"ssm": "s4d", "arch": "h3", "head_dim": 2}, {}, 1),
    "adaptive": ({"ssm": "s4", "adaptive_cutoffs": [8, 16], "adaptive_div_val": 2}, {}, 1),
    "loss in chunks": ({"ssm": "s4d", "loss_chunk_size": 32, "dropout": 0.1}, {}, 1),
    "carried": ({"ssm": "s4"}, {"carry_state": True}, 1),
    "checkpointing": ({"ssm": "s4d"}, {"gradient_checkpointing": True, "bf16": True}, 1),
    "zero 2": ({"ssm": "s4"}, {"deepspeed": "zero2"}, 2),
    "sequence parallel": ({"ssm": "s4d"}, {"sequence_parallel_size": 2}, 2),
}
MODES = ("auto", "chunk", "fft", "recurrent")


def digest(*things) -> str:
    """Of tensors by their bits, dtype and shape, and of whatever JSON can write, floats to their last digit."""
    import torch

    total = hashlib.sha256()
    for thing in things:
        if torch.is_tensor(thing):
            total.update(f"{thing.dtype} {tuple(thing.shape)}".encode())
            total.update(thing.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(json.dumps(thing, sort_keys=True).encode())
    return total.hexdigest()[:16]


def write_corpus(folder: Path) -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(20)]
    (folder / "text").mkdir()
    for split, lines in (("train", 700), ("valid", 60), ("test", 60)):
        text = "\n".join(" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(lines)) + "\n"
        (folder / "text" / f"{split}.txt").write_text(text)
    arguments = ["--dataset", str(folder / "text"), "--tokenizer", "words", "--output", str(folder / "corpus")]
    subprocess.run([sys.executable, "-m", "ssm_lm", "prepare", *arguments], check=True, stdout=subprocess.DEVNULL)


def train(folder: Path, name: str, model: dict, keys: dict, ranks: int) -> Path:
    output = folder / name.replace(" ", "-")
    config = {
        "model": TINY | model,
        "data": str(folder / "corpus"),
        "output_dir": str(output),
        "sequence_length": 40,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "ssm_learning_rate": 3e-3,
        "warmup_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    } | keys
    if config.get("deepspeed") == "zero2":
        stage = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
        stage |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
        config["deepspeed"] = str(folder / "zero2.json")
        Path(config["deepspeed"]).write_text(json.dumps(stage))
    path = folder / f"{output.name}.yaml"
    path.write_text(json.dumps(config))  # which is YAML, too
    if ranks == 1:
        from ssm_lm.cli import main

        if main(["train", str(path)]):
            raise SystemExit(f"training {name!r} failed")
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, "-m", "ssm_lm", "train", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def observe(run: Path) -> dict[str, str]:
    """The digests of a finished run."""
    import torch
    from safetensors.torch import load_file

    from ssm_lm import S4ForCausalLM

    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    curve = [[e.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss")] for e in history]
    weights = load_file(run / "model.safetensors")
    checkpoint = sorted(
        str(file.relative_to(run))
        for file in (run / "checkpoint-10").rglob("*")
        if file.is_file() and file.suffix != ".py"
    )
    model = S4ForCausalLM.from_pretrained(run).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (2, 37), generator=generator)
    found = {
        "losses": digest(curve),
        "keys": digest(sorted(weights), checkpoint),
        "weights": digest(*(weights[key] for key in sorted(weights))),
    }
    mixers = [module for module in model.modules() if hasattr(module, "ssm")]
    own = model.config.mode
    known = [mode for mode in MODES if mode != "fft" or all(mixer.ssm.is_time_invariant for mixer in mixers)]
    for mode in dict.fromkeys((own, *known)):
        for mixer in mixers:
            mixer.mode = mode
        with torch.no_grad():
            whole = model(ids).logits
            cached = model(ids, use_cache=True)
            more = model(ids[:, :5], past_key_values=cached.past_key_values).logits
            packed = model(ids, seq_idx=(torch.arange(37) // 11).expand(2, -1)).logits
        found[f"logits {mode}"] = digest(whole, cached.logits, more, packed)
    for mixer in mixers:
        mixer.mode = own
    settings = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    tokens = [model.generate(ids[:, :9], do_sample=False, **settings)]
    torch.manual_seed(0)
    tokens.append(model.generate(ids[:, :9], do_sample=True, **settings))
    tokens.append(model.generate(ids[:, :9], num_beams=3, do_sample=False, **settings))
    tokens.append(model.generate(ids[:1, :9], do_sample=False, prompt_lookup_num_tokens=4, **settings))
    found["tokens"] = digest(*tokens)
    model.train()
    torch.manual_seed(0)
    loss = model(ids, labels=ids, seq_idx=(torch.arange(37) // 11).expand(2, -1)).loss
    loss.backward()
    found["packed gradients"] = digest(loss, *(p.grad for p in model.parameters() if p.grad is not None))
    return found


def main() -> None:
    output, cases = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    folder = output.parent
    write_corpus(folder)
    results = {}
    for name in cases:
        model, keys, ranks = CASES[name]
        results[name] = observe(train(folder, name, model, keys, ranks))
        print(f"{name}: done", file=sys.stderr)
    output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
