"""What is compared: contenders, learning rates and seeds of one YAML file, and the runs that follow from them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..config.reading import check_keys, checked_values, read_yaml
from ..errors import UserError

KEYS = ("output_dir", "train", "learning_rates", "seeds", "contenders")
CONTENDER_KEYS = ("name", "family", "model", "overrides", "learning_rates")
# of each run, where the file does not say otherwise: many runs write into logs, not onto a terminal
QUIET = {"report_to": [], "disable_tqdm": True}


class Run(NamedTuple):
    """One run: a contender at a learning rate and a seed. values: of a training config, with `model` as a mapping."""

    contender: str
    rate: float
    seed: int
    values: dict

    @property
    def name(self) -> str:
        return f"{self.contender}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Contest:
    """A comparison. contenders: name -> the values of its training config, but for the learning rate and the seed.

    rates: the learning rates of each. seeds: all rates run with the first, the best rate with the others too.
    families: of those that are sizes of one kind, its name.
    """

    where: str
    folder: Path
    contenders: dict[str, dict]
    rates: dict[str, list[float]]
    seeds: list[int]
    families: dict[str, str] = field(default_factory=dict)

    def run(self, contender: str, rate: float, seed: int) -> Run:
        values = dict(self.contenders[contender])
        run = Run(contender, rate, seed, values)
        values |= {"learning_rate": rate, "seed": seed, "output_dir": str(self.folder / "runs" / run.name)}
        return run

    def first_runs(self, contender: str) -> list[Run]:
        """A run for every rate, with the first seed."""
        return [self.run(contender, rate, self.seeds[0]) for rate in self.rates[contender]]

    def repeats(self, contender: str, best_rate: float) -> list[Run]:
        """The runs of the best rate with the other seeds."""
        return [self.run(contender, best_rate, seed) for seed in self.seeds[1:]]


def read_contest(path: str, overrides: dict) -> Contest:
    """The contest of a YAML file. overrides: of `train`, and `output_dir`, as the command line gives them.

    Raises UserError for whatever the file has wrong, in the config of a contender too; no run is begun before.
    """
    values = read_yaml(path)
    check_keys(values, KEYS, path)
    for key in ("output_dir", "contenders", "learning_rates"):
        if not values.get(key):
            raise UserError(f"{path}: the key {key!r} is needed")
    common = values.get("train") or {}
    for key, kind, what in (("train", dict, "a mapping"), ("contenders", list, "a list")):
        if not isinstance(values.get(key, kind()), kind):
            raise UserError(f"{path}: {key} must be {what}")
    overrides = dict(overrides)
    folder = Path(overrides.pop("output_dir", values["output_dir"])).expanduser()
    seeds = _numbers(values.get("seeds", [1111]), int, f"{path}: seeds")
    contenders, rates, families = {}, {}, {}
    for number, entry in enumerate(values["contenders"], start=1):
        where = f"{path}, contender {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be a mapping with a name and a model")
        check_keys(entry, CONTENDER_KEYS, where)
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or name in contenders:
            raise UserError(f"{where}: name must be a word of letters, digits, . _ + -, and no other's, not {name!r}")
        where = f"{path}, {name}"
        if "family" in entry:
            families[name] = entry["family"]
            if not isinstance(families[name], str) or not families[name].strip():
                raise UserError(f"{where}: family must be a name that its sizes share, not {families[name]!r}")
        own = entry.get("overrides") or {}
        if not isinstance(own, dict):
            raise UserError(f"{where}: overrides must be a mapping")
        for key in ("learning_rate", "seed", "output_dir"):
            if key in own or key in common or key in overrides:
                raise UserError(f"{where}: {key} comes from learning_rates, seeds and output_dir; leave it out")
        rates[name] = _numbers(entry.get("learning_rates", values["learning_rates"]), float, f"{where}: learning_rates")
        config = QUIET | common | {"model": entry.get("model")}
        contenders[name] = checked_values(config, own | overrides, path, where)
    return Contest(path, folder, contenders, rates, seeds, families)


def check_contest(contest: Contest) -> None:
    """Make what every contender learns and is, and throw it away: UserError for what only that shows."""
    from ..training.checks import check_values
    from ..training.tasks import make_task

    for name in contest.contenders:
        values, where = contest.first_runs(name)[0].values, f"{contest.where}, {name}"
        check_values(values, where)
        make_task(values, where)


def _numbers(values, kind: type, where: str) -> list:
    values = values if isinstance(values, list) else [values]
    if not values or any(type(value) not in (int, kind) or value <= 0 for value in values):
        raise UserError(f"{where} must be a list of positive numbers, not {values!r}")
    if len(set(values)) < len(values):
        raise UserError(f"{where} names {max(values, key=values.count)} twice")
    return [kind(value) for value in values]
