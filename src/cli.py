"""The command line of trainer.py: turns flags and a recipe into a `Command`."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint import find_checkpoint
from config import Parser, add_flags, given
from device import best_device
from recipes import RECIPES, RunOptions, TrainConfig
from utils import UserError
from ViT import MODELS, ViTConfig

TASKS = {
    "resume": ("RUN", "resume a run"),
    "evaluate": ("CHECKPOINT", "evaluate a checkpoint, or a run's last, on the test set"),
    "export": ("RUN", "write the model of a run to model.pt: weights only, for sharing"),
}
DATA_FLAGS = ("data_dir", "device", "wait_minutes", "dataset")
TRAINING_FLAGS = ("test", "save_minutes", "keep_best", "tensorboard", "epochs", "accumulate")
TASK_FLAGS = {  # the flags that each task takes
    "resume": DATA_FLAGS + TRAINING_FLAGS,
    "evaluate": (*DATA_FLAGS, "split"),
    "export": ("library", "overwrite"),
}


@dataclass(frozen=True)
class Command:
    """What a command line of trainer.py asks for."""

    task: str  # "train", or one of TASKS
    path: Path | None  # of the task's checkpoint
    recipe: str
    model: ViTConfig
    training: TrainConfig
    options: RunOptions
    model_changes: dict[str, Any]  # the config fields that flags set
    training_changes: dict[str, Any]
    note: str  # on how the recipe was chosen

    @property
    def folder(self) -> Path:
        """The folder of the new or resumed run."""
        if self.task == "resume":
            return self.path.parent
        return self.options.output_dir / (self.options.name or self.recipe)


def parse(argv: list[str], description: str) -> Command:
    """Parses the command line of trainer.py; --help shows the chosen recipe's values."""
    first = Parser(prog="trainer.py", add_help=False)
    first.add_argument("--recipe", choices=RECIPES)
    first.add_argument("--device")
    known = first.parse_known_args(argv)[0]
    name, note = (known.recipe, "") if known.recipe else default_recipe(known.device)
    recipe = RECIPES[name]

    lines = (f"  {name:16}{each.about.splitlines()[0]}" for name, each in RECIPES.items())
    epilog = "\n".join(["recipes:", *lines])
    parser = Parser(prog=first.prog, description=description, epilog=epilog)
    text = f"a named set of options, which flags override ({name})"
    parser.add_argument("--recipe", choices=RECIPES, help=text)
    run = parser.add_argument_group("run")
    tasks = run.add_mutually_exclusive_group()
    for task, (metavar, text) in TASKS.items():
        tasks.add_argument(f"--{task}", metavar=metavar, type=find_checkpoint, help=text)
    add_flags(run, RunOptions())
    model = parser.add_argument_group("model (the recipe's values)")
    model.add_argument("--model", choices=MODELS, help="a size: sets --width, --depth and --heads")
    add_flags(model, recipe.model, leave_out=("channels", "classes"))  # from the data set
    add_flags(parser.add_argument_group("training (the recipe's values)"), recipe.train)
    arguments = parser.parse_args(argv)

    task = next((task for task in TASKS if getattr(arguments, task)), "train")
    size = MODELS[arguments.model] if arguments.model else {}
    model_changes = size | given(arguments, ViTConfig)
    changes = given(arguments, TrainConfig)
    if task == "train":
        for flag, its_task in (("library", "export"), ("split", "evaluate")):
            if flag in arguments:
                raise UserError(f"--{flag} works only with --{its_task}")
        length = {"epochs": 0, "steps": 0}  # either flag replaces the recipe's length
        training = length | changes if length.keys() & changes else changes
        train = replace(recipe.train, **training)
        sizes = {} if train.init_from else model_changes  # weights set their own
        configs = replace(recipe.model, **sizes), train
    else:
        allowed = ", ".join(f"--{each}" for each in TASK_FLAGS[task])
        for flag, value in vars(arguments).items():
            if value is not None and flag not in (task, *TASK_FLAGS[task]):
                what = f"--{flag} cannot be used with --{task}, which takes {allowed}"
                raise UserError(what.replace("_", "-"))
        configs = recipe.model, recipe.train
    return Command(
        task,
        getattr(arguments, task, None),
        name,
        *configs,
        RunOptions(**given(arguments, RunOptions)),
        model_changes,
        changes,
        note,
    )


def default_recipe(device: str | None) -> tuple[str, str]:
    """The recipe for this machine, and a line that says why."""
    kind = (device or best_device().type).split(":")[0]
    if kind == "cpu":
        return "cpu", "recipe cpu, made for a CPU (--recipe chooses another)"
    return "default", f"recipe default, made for a GPU such as this {kind} device"


def resume_hint(folder: Path, options: RunOptions) -> str:
    """How to resume a run, with the flags that its checkpoint does not store."""
    words = ["resume with --resume", shlex.quote(str(folder))]
    for name in options.changed():
        if name in TASK_FLAGS["resume"]:
            value, flag = getattr(options, name), name.replace("_", "-")
            switch = f"--{flag}" if value else f"--no-{flag}"
            words += [switch] if isinstance(value, bool) else [f"--{flag}", shlex.quote(str(value))]
    return " ".join(words)
