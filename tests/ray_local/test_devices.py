"""What computes on a GPU has reserved one, and gives it back."""

from typing import Any

import pytest
import ray

from reclora_dist.ray_app import embed

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("reserved", "device"), [([], "cpu"), ([0], "cuda")])
def test_items_are_embedded_on_the_gpu_that_was_reserved(
    monkeypatch: pytest.MonkeyPatch, reserved: list[int], device: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: reserved)
    monkeypatch.setattr(embed, "TextEncoder", lambda *args: asked.append(args))
    embed._Encoder("model", 64, 1)
    assert asked == [("model", 64, device)]
