"""What to change where a run does not fit, or only perhaps: the fewest changes that make it fit.

Changes that leave the training as it is come first: smaller micro-batches at the same global batch,
recomputation, another mesh, cached moments. What changes the training (no average, another
optimizer, a frozen text encoder) is tried where those are not enough, and said.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product

from omegaconf import OmegaConf

from sdx.config.check import check
from sdx.config.check_mesh import mesh_sizes
from sdx.config.folders import CONF
from sdx.config.leaves import spelled
from sdx.config.schema import (
    Cache,
    Config,
    MeshConfig,
    OptimizerConfig,
    OptimizerKind,
    Remat,
)
from sdx.planning import arrays
from sdx.planning.estimate import Estimate, complete

SHOWN = 3
MESHES = ("fsdp", "hsdp", "fsdp_tensor")  # of conf/mesh, those that spread the state
DEARER = {Remat.none: 0, Remat.dots: 1, Remat.blocks: 2, Remat.full: 3}


@dataclass(frozen=True)
class Change:
    """One thing to type."""

    typed: tuple[str, ...]
    cost: float
    """To choose between changes of one kind: the smaller the better."""
    apply: Callable[[Config], Config]


@dataclass(frozen=True)
class Advice:
    """Overrides with which the run fits."""

    typed: tuple[str, ...]
    needs_bytes: int
    changes_training: bool
    """Whether it is another experiment then."""
    note: str | None


NOTES = {"data.cache=moments": "after python -m sdx.encode with the same words"}


def advise(found: Estimate) -> list[Advice]:
    """The fewest changes after which the estimate and its margin fit, one for each combination of
    kinds; nothing where it fits, or where none of them is enough.
    """
    if found.usable_bytes is None or found.fits == "yes":
        return []
    same, other = _kinds(found), _drastic(found.config)
    trial = _Trial(found)
    for number in range(1, len(same) + 1):
        if answers := [*trial.all(combinations(same, number), changes_training=False)]:
            return _best(answers)
    for dropped in range(1, len(other) + 1):
        for number in range(len(same) + 1):
            chosen = (
                [*a, *b]
                for a, b in product(combinations(same, number), combinations(other, dropped))
            )
            if answers := [*trial.all(chosen, changes_training=True)]:
                return _best(answers)
    return []


def smallest_bytes(found: Estimate) -> int:
    """What one device needs with every change there is: no advice brings it below."""
    trial, config = _Trial(found), found.config
    for kind in (*_kinds(found), *_drastic(config)):
        config = min((change.apply(config) for change in kind), key=trial.needs)
    return trial.needs(config)


class _Trial:
    """Estimates of changed configurations; arrays, the slow part, are made once for each kind."""

    def __init__(self, found: Estimate):
        self._level = found.level
        self._config = config = found.config
        kind = (config.optimizer.kind, config.train.ema, config.train.text_encoder)
        self._held: dict[tuple[object, ...], arrays.Arrays] = {kind: found.held}

    def all(
        self, chosen: Iterator[Sequence[Sequence[Change]]], *, changes_training: bool
    ) -> Iterator[Advice]:
        """For each combination of kinds the cheapest of its changes that fit."""
        for kinds in chosen:
            ranked = sorted(product(*kinds), key=lambda changes: [one.cost for one in changes])
            ranked.sort(key=lambda changes: sum(one.cost for one in changes))
            if answer := next(
                filter(None, (self._advice(c, changes_training) for c in ranked)), None
            ):
                yield answer

    def needs(self, config: Config) -> int:
        """Bytes of one device, without the margin."""
        return self._estimate(config).device_bytes.total

    def _advice(self, changes: Sequence[Change], changes_training: bool) -> Advice | None:
        config = self._config
        for change in changes:
            config = change.apply(config)
        if check(config):
            return None
        found = self._estimate(config)
        if found.fits != "yes":
            return None
        typed = tuple(text for change in changes for text in change.typed)
        notes = [NOTES[text] for text in typed if text in NOTES]
        return Advice(typed, found.device_bytes.total, changes_training, ", ".join(notes) or None)

    def _estimate(self, config: Config) -> Estimate:
        return complete(config, self._arrays(config), self._level)

    def _arrays(self, config: Config) -> arrays.Arrays:
        """Made once for each mesh, its shapes once for each kind of state."""
        kind = (config.optimizer.kind, config.train.ema, config.train.text_encoder)
        key = (*kind, str(config.mesh))
        if key not in self._held:
            self._held[key] = arrays.describe(config, self._held.get(kind))
            self._held.setdefault(kind, self._held[key])
        return self._held[key]


def _best(answers: list[Advice]) -> list[Advice]:
    return sorted(answers, key=lambda answer: len(answer.typed))[:SHOWN]


def _kinds(found: Estimate) -> list[list[Change]]:
    """Changes that leave the training as it is, by kind."""
    config = found.config
    kinds = [
        _micro_batches(found),
        _remat(config),
        [*_meshes(config)],
        _cache_moments(config),
    ]
    return [kind for kind in kinds if kind]


def _micro_batches(found: Estimate) -> list[Change]:
    train = found.config.train
    parts = found.mesh["data"] * found.mesh["fsdp"]
    images = found.global_batch_size // parts  # of one share, in an update
    pieces = [
        number
        for number in range(train.gradient_accumulation + 1, images + 1)
        if images % number == 0
    ]
    return [_accumulate(found, number) for number in pieces]


def _accumulate(found: Estimate, pieces: int) -> Change:
    typed = (f"train.gradient_accumulation={pieces}",)
    before = found.config.train
    times = pieces / before.gradient_accumulation
    if before.global_batch_size is None:
        assert before.per_device_batch_size is not None
        size = before.per_device_batch_size / times
        typed += (f"train.per_device_batch_size={spelled(size)}",)

    def apply(config: Config) -> Config:
        size = config.train.per_device_batch_size
        train = replace(
            config.train,
            gradient_accumulation=pieces,
            per_device_batch_size=None if size is None else size / times,
        )
        return replace(config, train=train)

    return Change(typed, 0.3 * times, apply)


def _remat(config: Config) -> list[Change]:
    now = DEARER[config.train.remat]
    return [
        Change(
            (f"train.remat={remat.name}",),
            cost,
            lambda config, remat=remat: replace(config, train=replace(config.train, remat=remat)),
        )
        for remat, cost in DEARER.items()
        if cost > now
    ]


def _meshes(config: Config) -> Iterator[Change]:
    for cost, name in enumerate(MESHES):
        mesh = _preset(name)
        sizes, now = mesh_sizes(mesh, config.hardware), mesh_sizes(config.mesh, config.hardware)
        if (
            sizes is None
            or now is None
            or sizes.total[1] * sizes.total[2] <= now.total[1] * now.total[2]
        ):
            continue
        yield Change((f"mesh={name}",), cost, lambda config, mesh=mesh: replace(config, mesh=mesh))


@cache
def _preset(name: str) -> MeshConfig:
    node = OmegaConf.merge(
        OmegaConf.structured(MeshConfig), OmegaConf.load(CONF / f"mesh/{name}.yaml")
    )
    mesh = OmegaConf.to_object(node)
    assert isinstance(mesh, MeshConfig)
    return mesh


def _cache_moments(config: Config) -> list[Change]:
    if config.data.cache is not Cache.none:
        return []

    def apply(config: Config) -> Config:
        return replace(config, data=replace(config.data, cache=Cache.moments))

    return [Change(("data.cache=moments",), 1, apply)]


def _drastic(config: Config) -> list[list[Change]]:
    """Changes that make it another training, by kind."""
    kinds: list[list[Change]] = []
    if config.train.ema:
        kinds.append([_without(config, "ema")])
    if config.optimizer.kind is OptimizerKind.adamw:
        kinds.append([_with_adafactor()])
    if config.train.text_encoder:
        kinds.append([_without(config, "text_encoder")])
    return kinds


def _without(config: Config, name: str) -> Change:
    return Change(
        (f"train.{name}=false",),
        1,
        lambda config: replace(config, train=replace(config.train, **{name: False})),
    )


def _with_adafactor() -> Change:
    def apply(config: Config) -> Config:
        defaults = OptimizerConfig(kind=OptimizerKind.adafactor, lr=config.optimizer.lr)
        kept = {"weight_decay": config.optimizer.weight_decay}
        return replace(config, optimizer=replace(defaults, **kept))

    return Change(("optimizer=adafactor",), 2, apply)
