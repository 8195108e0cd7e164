"""FID and CLIP score of a folder, against what pytorch-fid and transformers compute of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdx.data.source import DataError
from sdx.data.tokenizer import load_tokenizer
from sdx.experiment.evaluation import picture_scores
from sdx.experiment.evaluation.picture_scores import PictureJudge
from sdx.experiment.evaluation.scoring import ClipNetwork
from sdx.parallel.mesh import one_device_mesh
from sdx.scores.frechet import Statistics, StatisticsError
from sdx.weights.errors import WeightsError
from tests.clip_folder import make_clip
from tests.models.torch_inception import torch_inception

TEXTS = ["a red circle", "noise", "a small blue square on grey"]
BATCH = 2  # does not divide the three pictures


def write_pictures(folder: Path, seed: int, count: int) -> list[Image.Image]:
    """Pictures of several shapes, with captions, and one that cannot be read."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    pictures, rows = [], []
    for n in range(count):
        size = (40 + 9 * n, 60 - 4 * n, 3)
        picture = Image.fromarray(rng.integers(0, 256 // (n + 1), size, np.uint8))
        picture.save(folder / f"{n}.png")
        pictures.append(picture)
        rows.append({"file_name": f"{n}.png", "text": TEXTS[n % 3]})
    (folder / "broken.png").write_bytes(b"\x89PNG")
    rows.append({"file_name": "broken.png", "text": "never seen"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pictures


def torch_features(model: Any, pictures: list[Image.Image]) -> np.ndarray:
    """As pytorch-fid's get_activations, one picture at a time."""
    rows = []
    with torch.no_grad():
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
            resized = torch.nn.functional.interpolate(
                pixels, size=(299, 299), mode="bilinear", align_corners=False
            )
            rows.append(model(2 * resized - 1)[0].double().numpy())
    return np.stack(rows)


def reference_clip_score(model: Any, folder: Path, pictures: list[Image.Image]) -> float:
    """The cosine of CLIPModel's own embeddings, a hundred times."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(pictures, return_tensors="np")["pixel_values"]
    tokens = load_tokenizer(folder, max_length=16).encode(TEXTS)
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(tokens).long(), pixel_values=torch.from_numpy(pixels)
        )
    cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    return float(100 * cosines.clamp(min=0).mean())


def assert_statistics(found: Statistics, features: np.ndarray) -> None:
    """Those that pytorch-fid takes of its features."""
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-4, atol=1e-4)
    covariance = np.cov(features, rowvar=False)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-4 * covariance.max())


def test_scores_are_those_of_the_reference_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance itself is test_frechet's; of 2048 features it takes 15 s of CPU."""
    compared: list[Statistics] = []

    def distance(*pair: Statistics) -> float:
        compared.extend(pair)
        return 12.5

    monkeypatch.setattr(picture_scores, "frechet_distance", distance)
    network, clip = torch_inception(), make_clip(tmp_path / "clip")
    torch.save(network.state_dict(), tmp_path / "pt_inception.pth")
    pictures = write_pictures(tmp_path / "drawn", 0, 3)
    real = write_pictures(tmp_path / "real", 1, 2)
    said: list[str] = []
    settings: dict[str, Any] = {"inception": tmp_path / "pt_inception.pth", "say": said.append}
    judge = PictureJudge(
        one_device_mesh(),
        BATCH,
        reference=tmp_path / "real",
        save_statistics=tmp_path / "drawn.npz",
        clip=tmp_path / "clip",
        **settings,
    )
    row = judge(tmp_path / "drawn")
    assert row["fid"] == 12.5
    for statistics, shown in zip(compared, (pictures, real), strict=True):
        assert_statistics(statistics, torch_features(network, shown))
    assert row["fid_of"]["count"] == 3 and row["fid_of"]["reference"]["count"] == 2
    assert row["pictures"] | {"left_out": 1, "count": 3} == row["pictures"]
    assert row["clip_score"] == pytest.approx(
        reference_clip_score(clip, tmp_path / "clip", pictures), rel=1e-4
    )
    assert any("biased upwards" in line for line in said)
    with np.load(tmp_path / "drawn.npz") as file:
        np.testing.assert_array_equal(file["mu"], compared[0].mean)


def judge(folder: Path, **options: Any) -> PictureJudge:
    unsaid = dict.fromkeys(("reference", "inception", "save_statistics", "clip"))
    settings: dict[str, Any] = {**unsaid, **options}
    return PictureJudge(one_device_mesh(), BATCH, say=lambda text: None, **settings)


@pytest.mark.fast
def test_what_cannot_be_compared_is_refused_before_pictures_are_looked_at(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(StatisticsError, match="of 3 features, must be of the 2048"):
        judge(tmp_path, reference=tmp_path / "few.npz")
    with pytest.raises(DataError, match="no pictures"):
        judge(tmp_path, reference=tmp_path)
    with pytest.raises(WeightsError, match=r"gone\.pth: not there"):
        judge(tmp_path, inception=tmp_path / "gone.pth")


def test_a_caption_is_needed_for_each_picture(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    write_pictures(tmp_path / "drawn", 0, 2)
    Image.new("RGB", (9, 9)).save(tmp_path / "drawn" / "extra.png")
    with pytest.raises(DataError, match="1 of 4 pictures of .* have no caption, extra.png"):
        judge(tmp_path, clip=tmp_path / "clip")(tmp_path / "drawn")


def test_a_clip_whose_numbers_are_not_finite_is_told(tmp_path: Path) -> None:
    model = make_clip(tmp_path)
    model.visual_projection.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    network = ClipNetwork(tmp_path, one_device_mesh(), BATCH)
    with pytest.raises(WeightsError, match="CLIP score: features are not finite"):
        network.add(np.zeros((1, 32, 32, 3), np.float32), ["a red circle"])
