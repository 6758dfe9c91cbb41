"""Seeds, and how a program ends."""

import os
import sys

import pytest
import torch

import utils
from small import ROOT, ran
from utils import generator_for


def test_generators_depend_on_their_key_and_on_nothing_else():
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 0, 0), (0, 1, 0), (2**40, 3)]
    draws = {key: torch.rand(4, generator=generator_for(*key)).tolist() for key in keys}
    torch.manual_seed(7)
    for key in keys:
        assert draws[key] == torch.rand(4, generator=generator_for(*key)).tolist()
    assert len({tuple(draw) for draw in draws.values()}) == len(keys)


def test_default_generators_are_seeded_as_torch_does():
    utils.seed_default_generators(2**63 - 1, torch.device("cpu"))
    draw = torch.rand(4)
    torch.manual_seed(2**63 - 1)
    assert torch.equal(draw, torch.rand(4))


def when_torch_is_imported(statement, program):
    """Code that runs a program, and a statement when the program starts to import torch."""
    return f"""
import os, runpy, signal, sys
class Watch:
    def find_spec(self, name, *_):
        if name == 'torch': {statement}
sys.meta_path.insert(0, Watch())
sys.path.insert(0, {str(ROOT / "src")!r})
runpy.run_path({str(ROOT / program)!r}, run_name='__main__')
"""


@pytest.mark.parametrize("program", ["src/trainer.py", "src/predict.py", "visualization/vis.py"])
def test_idle_threads_sleep_unless_the_user_has_set_how_they_wait(program):
    """The setting is in place before the import of torch, which reads it."""
    source = when_torch_is_imported(
        "sys.exit(os.environ.get('GOMP_SPINCOUNT', 'not set'))", program
    )
    for setting, expected in (({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "not set")):
        plain = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        done = ran(sys.executable, "-c", source, env=plain | setting)
        assert done.stderr.strip() == expected


@pytest.mark.parametrize(
    ("name", "encoding", "printed"),
    [
        (b"\xe2\x98\x83.txt", "cp1252", "\\u2603.txt"),  # a snowman
        (b"\xff.txt", "utf-8", "\\udcff.txt"),  # not UTF-8
    ],
)
def test_a_name_that_the_output_cannot_encode_is_escaped(tmp_path, name, encoding, printed):
    file = os.fsencode(tmp_path) + b"/" + name
    with open(file, "w"):
        pass
    program = [sys.executable, ROOT / "src/predict.py", file, "--device", "cpu"]
    done = ran(*program, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and printed in done.stderr


MAIN = """
import pathlib, utils
def main(argv):
    print('progress')
    utils.complain('a warning')
    pathlib.Path(argv[0]).touch()
    utils.print_result('a result')
    return 0
utils.run_program(main)
"""


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (">&-", 0),
        (">&- 2>&-", 0),
        ("2>/dev/full", 0),
        (">/dev/full", 2),
        ("&>/dev/full", 2),
        ("| true", 141),  # the reader is gone; no message
    ],
)
def test_output_that_cannot_be_written_ends_no_program_and_is_no_traceback(
    tmp_path, output, status
):
    """The program reports a lost result only if it is written nowhere else."""
    command = f'set -o pipefail; {sys.executable} -c "{MAIN}" {tmp_path}/file {output}'
    done = ran("bash", "-c", command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == status and (tmp_path / "file").exists()
    said = "the output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr and (said in done.stderr) == (output == ">/dev/full")


def test_ctrl_c_while_modules_are_imported_ends_the_program_with_130_and_no_word():
    hook = "os.kill(os.getpid(), signal.SIGINT)"
    done = ran(sys.executable, "-c", when_torch_is_imported(hook, "src/predict.py"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
