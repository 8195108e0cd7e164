"""Sources of other packages: what they are handed, and how their faults are told."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdx.config.schema import DataConfig, DataKind
from sdx.data.source import BadImage, BadImageError, DataError, Example, Source
from sdx.data.sources import plugins
from sdx.data.sources.open import open_source
from sdx.data.sources.plugins import PluginFault

pytestmark = pytest.mark.fast


@dataclass
class Gray:
    """Pictures of one gray level each; `fault` happens at example 2."""

    length: int
    fault: Any = None
    fingerprint: str = "gray"
    bad_images: list[BadImage] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=lambda: {"source": "toy"})

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if isinstance(self.fault, Exception) and index == 2:
            raise self.fault
        if self.fault is not None and index == 2:
            given: Any = self.fault
            return given
        return Example(np.full((4, 6, 3), index, np.uint8), (f"gray {index}",))


def make(options: Mapping[str, Any], *, split: str, resolution: int) -> Any:
    if "raises" in options:
        raise options["raises"]
    if "gives" in options:
        return options["gives"]
    assert (split, resolution) == ("train", 16)
    return Gray(options["length"], options.get("fault"))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("toy", f"{__name__}:make", plugins.GROUP),
        EntryPoint("lost", "sdx.no_such_module:make", plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: make if self.name == "toy" else _lost())


def _lost() -> Any:
    raise ModuleNotFoundError("No module named 'sdx.no_such_module'")


def opened(name: str = "toy", split: str = "train", **options: Any) -> Source:
    data = DataConfig(kind=DataKind.plugin, plugin=name, options=options, split=split)
    return open_source(data, resolution=16)


def refusal(name: str = "toy", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(name, **options)
    return str(caught.value)


def test_a_plugin_is_handed_options_split_and_resolution() -> None:
    source = opened(length=5)
    assert len(source) == 5 and source.fingerprint == "gray"
    np.testing.assert_array_equal(source[3].pixels, np.full((4, 6, 3), 3, np.uint8))
    part = opened(split="train[40%:]", length=5)
    assert [part[i].captions for i in range(3)] == [("gray 2",), ("gray 3",), ("gray 4",)]
    assert vars(part)["_source"].provenance == {"source": "toy"}


def test_unknown_names_list_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal("tou")
    assert message.startswith("data.plugin=tou: no installed package has such an entry point")
    assert "installed are lost, toy" in message
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    assert "none is installed" in refusal()


def test_what_a_plugin_raises_names_it() -> None:
    message = refusal(raises=KeyError("folder"))
    assert message.startswith("data.plugin=toy (")
    assert "raised KeyError: 'folder'" in message and "test_plugins.py:" in message
    assert "raised ModuleNotFoundError" in refusal("lost")
    assert refusal(raises=DataError("no such folder")).endswith(": no such folder")
    assert "gave a int, must be a source" in refusal(gives=3)
    assert "gave a Gray, must be a source" in refusal(gives=replace(Gray(1), fingerprint=3))


@pytest.mark.parametrize(
    "fault, said",
    [
        (ZeroDivisionError("x"), "ZeroDivisionError: x"),
        ((1, 2), "is a tuple, must be an sdx.data.source.Example"),
        ("captions", "has no captions"),
        ("text", "a caption of it is no text"),
        ("float", "its image is float32 (4, 4, 3)"),
        ("gray", "its image is uint8 (4, 4)"),
    ],
)
def test_faults_of_examples_name_the_plugin(fault: Any, said: str) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    examples = {
        "captions": lambda: unchecked(image, ()),
        "text": lambda: unchecked(image, (3,)),
        "float": lambda: unchecked(image.astype(np.float32), ("x",)),
        "gray": lambda: unchecked(Image.new("L", (4, 4)), ("x",)),
    }
    given = examples[fault]() if isinstance(fault, str) else fault
    source = opened(length=3, fault=given)
    assert source[1].captions == ("gray 1",)
    with pytest.raises(PluginFault) as caught:
        source[2]
    assert "data.plugin=toy" in str(caught.value) and "example 2" in str(caught.value)
    assert said in str(caught.value)


def unchecked(image: Any, captions: Any) -> Example:
    """An example past the type checks that a plugin does not run under."""
    example = object.__new__(Example)
    object.__setattr__(example, "image", image)
    object.__setattr__(example, "captions", captions)
    return example


def test_a_bad_image_stays_one() -> None:
    source = opened(length=3, fault=BadImageError("missing", "no such file", "2.png"))
    with pytest.raises(BadImageError):
        source[2]
