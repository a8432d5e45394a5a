"""What reaches into DeepSpeed's engines and optimizers."""


def share_master_weights(engine) -> None:
    """Let a ZeRO 3 engine keep float32 parameters once. Nothing happens under another engine.

    DeepSpeed means to: where parameters are float32 already, its master weights are to be the same memory. But it
    compares a device with a string, finds them different, and holds a second copy of every rank's part.
    """
    zero = getattr(engine, "optimizer", None)
    parameters = getattr(zero, "fp16_partitioned_groups_flat", [])  # so called, whatever their dtype
    masters = getattr(zero, "fp32_partitioned_groups_flat", [])
    for parameter, master in zip(parameters, masters, strict=True):
        # None, and elsewhere, where they are offloaded
        if parameter is not None and (parameter.dtype, parameter.device) == (master.dtype, master.device):
            master.data = parameter.data
