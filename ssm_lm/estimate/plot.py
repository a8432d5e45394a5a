"""The plot of `ssm-lm estimate --scaling`."""

from pathlib import Path

from ..errors import UserError


def plot_scaling(report: dict, path: Path) -> None:
    """Step time and scaling efficiency over the number of GPUs, a line a ZeRO stage. Raises UserError."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'ssm_lm[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ssm_lm"}
    from matplotlib import pyplot

    figure, (times, shares) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rows = report["scaling"]
    for stage, style in zip(sorted({row["stage"] for row in rows}), ("-", "--", ":", "-."), strict=False):
        mine = [row for row in rows if row["stage"] == stage]
        ranks = [row["ranks"] for row in mine]
        times.plot(ranks, [row["step"] for row in mine], style, label=f"ZeRO {stage}")
        shares.plot(ranks, [100 * row["scaling_efficiency"] for row in mine], style, label=f"ZeRO {stage}")
    times.set_ylabel("seconds a step")
    shares.set_ylabel("% of one GPU's speed")
    for axes in (times, shares):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"{report['run']['device']} GPUs")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    times.legend(frameon=False)
    try:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=110)
    except OSError as error:
        raise UserError(f"--plot: cannot write {path}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
