"""The peak of a real training step, from every allocation that PyTorch's CPU allocator reports to its profiler.

Deterministic, unlike the resident size of a process; what operators allocate inside themselves is in it. Every
rank of a group runs this file with a JSON of arguments for `measure`, and rank 0 writes the result.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch
from tiny import checkpoint_activations
from torch.profiler import ProfilerActivity, profile

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.training.param_groups import parameter_groups


def peak_of(run) -> int:
    """The most bytes alive at a time among those allocated during run()."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(keys: dict, batch_size: int, length: int, checkpointing=False, bf16=False, stage=None, bucket=None) -> int:
    """Two steps of AdamW on random tokens, the model and the engine made within the measurement."""
    config = S4Config(**keys, use_cache=False)
    tokens = torch.randint(0, config.vocab_size, (batch_size, length))

    def run():
        torch.manual_seed(0)
        model = S4ForCausalLM(config).train()
        if checkpointing:
            checkpoint_activations(model)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-3, 0.1), fused=True)
        engine = model
        if stage is not None:
            engine = with_deepspeed(model, optimizer, batch_size, stage, bucket, bf16)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16 and stage is None):
                loss = engine(input_ids=tokens, labels=tokens, skip_logits=True).loss
            if stage is None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                engine.backward(loss)
                engine.step()
            del loss

    return peak_of(run)


def with_deepspeed(model, optimizer, batch_size, stage, bucket, bf16):
    import deepspeed

    zero = {"stage": stage}
    if stage in (1, 2):
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "allgather_bucket_size": bucket}
    if stage:
        zero["reduce_bucket_size"] = bucket
    if stage == 3:
        zero |= {"overlap_comm": True, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
    }
    if bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def let_go_by_gloo(all_reduce):
    """all_reduce, and then a wait until gloo's thread no longer holds the tensor.

    The thread reports the work as done a moment before it drops it. On a busy machine it is then the last to hold a
    bucket, and what another thread frees the profiler does not see: the bucket would count as alive for ever.
    """

    def reduced(tensor, *args, **kwargs):
        held, deadline = tensor._use_count(), time.monotonic() + 60
        work = all_reduce(tensor, *args, **kwargs)
        while work is None and tensor._use_count() > held:
            assert time.monotonic() < deadline, "gloo holds a tensor that it has reduced"
            time.sleep(1e-4)
        return work

    return reduced


if __name__ == "__main__":
    from ssm_lm.training.environment import prepare_process

    prepare_process(uses_deepspeed=True)
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    torch.distributed.all_reduce = let_go_by_gloo(torch.distributed.all_reduce)
    found = measure(**json.loads(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
