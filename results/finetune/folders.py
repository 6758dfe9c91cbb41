"""Folders of ten classes of CIFAR-100: 20, 50 and 200 training pictures of each, 50 to judge by.

    python results/finetune/folders.py     writes d0-20, d0-50, ... d2-200 into the current folder

All are of CIFAR-100's training set. Each of the three draws has classes of its own.
"""

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100

data = CIFAR100(Path(__file__).parents[2] / "data", train=True, download=True)
labels = np.array(data.targets)
for draw in range(3):
    random = np.random.default_rng(draw)
    for label in random.choice(100, 10, replace=False):
        rows = random.permutation(np.flatnonzero(labels == label))
        for count in (20, 50, 200):
            for part, chosen in (("train", rows[50 : 50 + count]), ("val", rows[:50])):
                folder = Path(f"d{draw}-{count}", part, data.classes[label])
                folder.mkdir(parents=True, exist_ok=True)
                for row in chosen:
                    data[row][0].save(folder / f"{row:05}.png")
