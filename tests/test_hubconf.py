"""torch.hub: the same model as from `load_model`, and the caller's modules stay in place."""

import pickle
import runpy
import sys
import types

import torch

from checkpoint import load_model
from small import ROOT


def test_torch_hub_gives_the_model_beside_modules_of_the_same_names(monkeypatch):
    mine, path = types.ModuleType("utils"), list(sys.path)
    monkeypatch.setitem(sys.modules, "utils", mine)
    monkeypatch.delitem(sys.modules, "shapes")  # the caller may import one later
    model = torch.hub.load(str(ROOT), "vit_cifar10", source="local")
    assert sys.modules["utils"] is mine and "shapes" not in sys.modules and sys.path == path

    expected, checkpoint = load_model(ROOT / "checkpoints/vit_cifar10.pt")
    image = model.preprocessing.read(ROOT / "docs/deer.png")[None]
    logits = model(model.preprocessing.normalize(image))
    assert not model.training and not isinstance(model, type(expected))
    assert torch.equal(logits, expected(checkpoint.preprocessing.normalize(image)))
    assert model.classes[logits.argmax()] == "deer"

    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(model.preprocessing.normalize(image)), logits)
    assert type(torch.hub.load(str(ROOT), "vit_cifar10", source="local")) is type(model)

    names = [name for name, each in runpy.run_path(ROOT / "hubconf.py").items() if callable(each)]
    assert [name for name in names if not name.startswith("_")] == ["vit_cifar10"]
