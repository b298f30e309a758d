"""Images brought to networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import anybatch
from anybatch.models import FeaturePyramid, Network, load_weights, transforms


def photo(height: int = 300, width: int = 420) -> Image.Image:
    values = torch.randint(0, 256, (height // 20, width // 20, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


def network(name: str = "resnet18", **options: Any) -> Network:
    made = anybatch.create_model(name, "bn", width=8, **options)
    assert isinstance(made, Network)
    return made


def test_the_same_images_as_torchvisions_presets() -> None:
    model = network()
    model.default_cfg["interpolation"] = "bilinear"
    expected = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()(photo())
    got = transforms(model)(photo())
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_loaded_weights_and_a_photo_give_torchvisions_logits() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    model = anybatch.create_model("resnet18", "bn").eval()
    assert isinstance(model, Network)
    load_weights(model, theirs.state_dict())
    model.default_cfg["interpolation"] = "bilinear"
    x = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()(photo())[None]
    with torch.no_grad():
        torch.testing.assert_close(model(transforms(model)(photo())[None]), theirs(x), rtol=1e-4, atol=1e-4)


def test_images_of_every_kind_become_what_the_network_takes() -> None:
    image = photo(64, 64)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for in_chans in (1, 3):
        model = network("resnet8", in_chans=in_chans)
        bring = transforms(model)
        expected = bring(image)
        assert expected.shape == (in_chans, 32, 32)
        assert expected.dtype == torch.float32
        torch.testing.assert_close(bring(pixels), expected, rtol=0, atol=0.1)  # grey values and sizes are rounded
        torch.testing.assert_close(bring(pixels / 255), bring(pixels), rtol=0, atol=0.1)
        assert bring(pixels.expand(5, 3, 64, 64)).shape == (5, in_chans, 32, 32)
        for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
            assert bring(image.convert(mode)).shape == (in_chans, 32, 32)
        torch.testing.assert_close(bring(image.convert("RGBA")), expected, rtol=0, atol=0)
        assert bring(pixels[:1]).shape == (in_chans, 32, 32)
        assert model(expected[None]).shape == (1, 1000)


def test_small_images_are_not_cropped_and_values_are_normalized() -> None:
    model = network("resnet8", in_chans=5)
    with pytest.raises(ValueError, match=r"default_cfg\['mean'\] is \(.*\) for images of 5 channels; set one number"):
        transforms(model)
    model.default_cfg |= {"mean": (0.5,) * 5, "std": (0.25,) * 5}
    pixels = torch.randint(0, 256, (5, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(transforms(model)(pixels), (pixels / 255 - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("entry", "wrong", "message"),
    [
        ("mean", None, "finite numbers, got None"),
        ("mean", (0.5, float("nan"), 0.5), "finite numbers"),
        ("std", (1, 0, 1), "finite numbers above 0"),
        ("input_size", (3, 32), "three whole numbers above 0"),
        ("crop_pct", 0, "a number above 0"),
        ("interpolation", "cubic", "one of nearest, .*bicubic"),
    ],
)
def test_entries_to_which_no_image_can_be_brought_are_refused(entry: str, wrong: object, message: str) -> None:
    model = network()
    model.default_cfg[entry] = wrong
    with pytest.raises(ValueError, match=rf"default_cfg\['{entry}'\] must be {message}"):
        transforms(model)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a network of create_model, got FeaturePyramid"):
        transforms(FeaturePyramid(network()))  # pyright: ignore[reportArgumentType]
