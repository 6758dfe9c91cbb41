"""Entry points for `torch.hub.load`.

    model = torch.hub.load("OWNER/REPOSITORY", "vit_cifar10")  # a clone: PATH, source="local"
    image = model.preprocessing.read("photo.jpg")  # uint8 (3, 32, 32)
    logits = model(model.preprocessing.normalize(image[None]))  # (1, 10)

`model.classes` names the classes of the logits.
"""

import pathlib
import sys

dependencies = ["torch", "torchvision", "numpy"]
_SRC = pathlib.Path(__file__).resolve().parent / "src"


def vit_cifar10():
    """The model in checkpoints/vit_cifar10.pt, in evaluation mode, on the CPU."""
    model, checkpoint = _checkpoint_module().load_model(_SRC.parent / "checkpoints/vit_cifar10.pt")
    model.preprocessing, model.classes = checkpoint.preprocessing, tuple(checkpoint.classes)
    return model


def _checkpoint_module():
    """Imports src/checkpoint.py; its modules get a prefix, as callers may have a `utils`."""
    names = {path.stem: f"vit_cifar10_{path.stem}" for path in _SRC.glob("*.py")}
    theirs = {name: sys.modules.pop(name) for name in names.keys() & sys.modules.keys()}
    sys.modules |= {name: sys.modules[long] for name, long in names.items() if long in sys.modules}
    sys.path.insert(0, str(_SRC))
    try:
        return __import__("checkpoint")
    finally:
        sys.path.remove(str(_SRC))
        for name in names.keys() & sys.modules.keys():
            module = sys.modules[names[name]] = sys.modules.pop(name)
            module.__name__ = names[name]  # torch.compile and pickle look it up
            for each in vars(module).values():
                if isinstance(each, type) and each.__module__ == name:
                    each.__module__ = names[name]
        sys.modules |= theirs
