"""Which changes make another run, and what the others mean for one that continues."""

import dataclasses

import pytest

from sdx.config import identity as module
from sdx.config.identity import differences, folder_names, identity, run_folder_name
from sdx.config.leaves import leaves
from sdx.config.resolve import with_global_batch
from sdx.config.schema import OnResume
from tests.config.quick import quick

pytestmark = pytest.mark.fast

BASE = ["train.max_steps=100", "train.per_device_batch_size=16"]


def hash_of(*overrides: str) -> str:
    return identity(quick([*BASE, *overrides]))


SAME_RUN = [
    "train.max_steps=200",
    "train.max_steps=null train.epochs=2",
    "attention=dot_product",
    "train.remat=full",
    "checkpoint.every=7",
    "checkpoint.keep=5",
    "sample.every=null",
    "sample.prompts=[x]",
    "metrics.every=1",
    "metrics.sinks=[jsonl]",
    "data.num_workers=2",
    "run.tags=[a]",
    "run.name=other",
    "run.output_dir=elsewhere",
    "run.resume=must",
    "train.max_bad_steps=3",
    "hardware=gpu_h100_8 train.per_device_batch_size=2",
    "hardware=gpu_h100_8 mesh=fsdp train.per_device_batch_size=2",
    "train.per_device_batch_size=4 train.gradient_accumulation=4",
    "train.per_device_batch_size=null train.global_batch_size=16",
    "train.global_batch_size=16",
    "diffusion.snr_gamma=5",
]
OTHER_RUN = [
    "run.seed=1",
    "optimizer.lr=1e-6",
    "optimizer.scale_lr=true",
    "train.per_device_batch_size=8",
    "train.ema=false",
    "train.max_samples=99",
    "data.random_flip=true",
    "data.caption_dropout=0.35",
    "data.num_examples=50",
    "diffusion.snr_gamma=null",
    "lr_schedule=cosine",
    "model.pretrained=some/folder",
    "model.weights_dtype=bfloat16",
    "model.activations_dtype=bfloat16",
]


@pytest.mark.parametrize("change", SAME_RUN)
def test_not_part_of_the_identity(change: str) -> None:
    assert hash_of(*change.split()) == hash_of()


@pytest.mark.parametrize("change", OTHER_RUN)
def test_part_of_the_identity(change: str) -> None:
    assert hash_of(*change.split()) != hash_of()


def test_the_spelling_of_a_value_does_not_matter() -> None:
    spellings = ["optimizer.lr=1e-5", "optimizer.lr=0.00001", "++optimizer.lr=1.0e-05"]
    assert len({hash_of(spelling) for spelling in spellings}) == 1


@pytest.mark.parametrize("spelling", ["./photos", "photos/", "photos/.", "a/../photos"])
def test_the_spelling_of_a_folder_does_not_matter(spelling: str) -> None:
    kind = "data=imagefolder"
    assert hash_of(kind, f"data.dir={spelling}") == hash_of(kind, "data.dir=photos")
    assert hash_of(kind, "data.dir=/photos") != hash_of(kind, "data.dir=photos")
    changed = differences(
        quick([*BASE, kind, f"data.dir={spelling}"]), quick([*BASE, kind, "data.dir=photos"])
    )
    assert changed == []


def test_a_local_copy_is_what_is_trained_on_whatever_the_name_beside_it() -> None:
    assert hash_of("data=pokemon", "data.dir=copy") == hash_of("data=naruto", "data.dir=copy")
    assert hash_of("data=pokemon") != hash_of("data=naruto")


def test_what_the_model_implies_equals_what_is_spelled_out() -> None:
    config = quick(BASE)
    spelled = [
        f"data.resolution={config.model.resolution}",
        f"diffusion.prediction_type={config.model.prediction_type.name}",
    ]
    assert hash_of(*spelled) == hash_of()


def test_max_steps_counts_where_the_rate_decays() -> None:
    cosine = "lr_schedule=cosine"
    assert hash_of(cosine) != hash_of(cosine, "train.max_steps=200")
    fixed = [cosine, "lr_schedule.decay_steps=100"]
    assert hash_of(*fixed) == hash_of(*fixed, "train.max_steps=200") == hash_of(cosine)


def test_epochs_count_as_the_steps_they_come_to() -> None:
    epochs = ["data.num_examples=160", "train.max_steps=null", "train.epochs=10"]
    cosine = ["lr_schedule=cosine", "data.num_examples=160"]
    assert hash_of("lr_schedule=cosine", *epochs) == hash_of(*cosine)  # 10 x 160 / 16 = 100


def test_a_warm_up_counts_in_steps() -> None:
    warm = ["lr_schedule=constant_with_warmup", "lr_schedule.warmup_steps=10"]
    share = [warm[0], "lr_schedule.warmup_steps=null", "lr_schedule.warmup_fraction=0.1"]
    assert hash_of(*warm) == hash_of(*share) != hash_of()
    assert hash_of(*warm, "train.max_steps=200") == hash_of(*warm)
    assert hash_of(*share, "train.max_steps=200") != hash_of(*share)


def test_keys_without_effect_do_not_count() -> None:
    config = quick(BASE)
    idle = dataclasses.replace(config, data=dataclasses.replace(config.data, caption_column="x"))
    assert identity(idle) == identity(config)


def test_a_key_added_later_is_left_out_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick(BASE)
    before = identity(config)
    known = dict(leaves())
    added = dataclasses.replace(known["optimizer.eps"], path="optimizer.added", default=7)
    monkeypatch.setattr(module, "leaves", lambda: known | {"optimizer.added": added})
    plain = module.flatten
    monkeypatch.setattr(module, "flatten", lambda config: plain(config) | {"optimizer.added": 7})
    assert identity(config) == before
    monkeypatch.setattr(module, "flatten", lambda config: plain(config) | {"optimizer.added": 8})
    assert identity(config) != before


def test_the_batch_of_unnamed_hardware_needs_the_number_of_devices() -> None:
    config = quick([*BASE, "hardware=gpu"])
    with pytest.raises(ValueError, match=r"train.global_batch_size: missing, hardware=gpu"):
        identity(config)
    assert identity(config, num_devices=1) == hash_of()
    assert identity(with_global_batch(config, num_devices=1)) == hash_of()


def test_folder_names() -> None:
    config = quick(BASE)
    assert run_folder_name(config) == f"tiny-shapes-{hash_of()}"
    assert run_folder_name(quick([*BASE, "run.name=mine"])) == "mine"


def test_jobs_of_a_sweep_get_folders_of_their_own() -> None:
    lines = [["optimizer.lr=1e-5"], ["optimizer.lr=1e-6"]]
    names = folder_names([quick([*BASE, *line]) for line in lines], lines)
    assert names == [f"tiny-shapes-{hash_of(*line)}" for line in lines]
    named = [quick([*BASE, "run.name=mine", *line]) for line in lines]
    assert folder_names(named, lines) == [f"mine-{hash_of(*line)}" for line in lines]
    outside = [["sample.num_steps=5", "run.seed=3"], ["sample.num_steps=6", "run.seed=3"]]
    names = folder_names([quick([*BASE, *line]) for line in outside], outside)
    stem = f"tiny-shapes-{hash_of('run.seed=3')}"
    assert names == [f"{stem}-sample.num_steps=5", f"{stem}-sample.num_steps=6"]


def changed(old: list[str], new: list[str]) -> dict[str, OnResume]:
    found = differences(quick([*BASE, *old]), quick([*BASE, *new]))
    return {item.path: item.on_resume for item in found}


def test_changes_are_classified() -> None:
    new = ["optimizer.lr=1e-6", "run.seed=1", "checkpoint.every=7", "train.max_steps=300"]
    assert changed([], new) == {
        "run.seed": OnResume.forbidden,
        "optimizer.lr": OnResume.warn,
        "checkpoint.every": OnResume.free,
        "train.max_steps": OnResume.free,
    }


def test_a_longer_decay_is_said_and_other_hardware_with_the_same_batch_is_free() -> None:
    cosine = ["lr_schedule=cosine"]
    longer = changed(cosine, [*cosine, "train.max_steps=300"])
    assert longer["lr_schedule.decay_steps"] is OnResume.warn
    moved = changed([], ["hardware=gpu_h100_8", "train.per_device_batch_size=2"])
    assert "train.global_batch_size" not in moved
    assert set(moved.values()) == {OnResume.free}
    assert changed([], ["train.per_device_batch_size=8"])["train.global_batch_size"] is (
        OnResume.forbidden
    )


def test_a_difference_reads_as_typed() -> None:
    [difference] = differences(quick(BASE), quick([*BASE, "train.max_steps=300"]))
    assert str(difference) == "train.max_steps: 100 -> 300"
    assert differences(quick(BASE), quick(BASE)) == []
