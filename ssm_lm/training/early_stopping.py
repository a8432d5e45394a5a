"""A run that no longer gets better ends by itself."""

from transformers import TrainerCallback


class EarlyStopping(TrainerCallback):
    """Ends training after `patience` evaluations in a row that were not better than the best one before them.

    It counts in the log, which a checkpoint holds: a run that was killed and resumed ends where an undisturbed one
    does.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args, state, control, **kwargs):
        key = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        values = {entry["step"]: entry[key] for entry in state.log_history if key in entry}
        if since_best(list(values.values()), bool(args.greater_is_better)) >= self.patience:
            control.should_training_stop = True


def since_best(values: list[float], greater_is_better: bool = False) -> int:
    """How many evaluations there were after the first of the best ones; one that is no number is never better."""
    best, at = None, -1
    for place, value in enumerate(values):
        better = best is None or (value > best if greater_is_better else value < best)
        if value == value and better:
            best, at = value, place
    return len(values) - 1 - at
