"""Make wrong calls of everything public, and judge the answers.

`python tests/helpers/wrong_calls.py [--every K] [--first I] [--only WORD] [--show]` makes every
K-th of them and prints how many were answered in which way. The calls run in a process of their
own, which is ended and started again behind a call that does not come back.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import itertools
import json
import linecache
import os
import re
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import public_calls
import torch
from public_calls import Call
from wrong_values import Try

import pyflocality as pf

# Where errors of the library are raised, and those of the test of this module.
OURS = Path(pf.__file__).parent, Path(__file__).parents[1] / "test_wrong_calls.py"
# The answers that are right.
GOOD = ("taken", "refused")
# A call that takes longer is given up.
SECONDS = 30.0
# An error that takes longer to come was looked for in the wrong order.
SLOW = 1.0
# Memory beyond what the process has at its start.
MEMORY = 3 * 2**30


class Answer(NamedTuple):
    """How a wrong call was answered.

    Attributes:
        case: `callable(argument=label)`.
        kind: "taken" or "refused", which are right; or what is wrong: "deep" (an error of another
            class than the documented ones), "unnamed" (of an argument that it does not name),
            "late" (after work), "silent" (no error where there must be one), "not finite",
            "different" (another answer to the same values), "hang".
        detail: The error, or what was answered.
    """

    case: str
    kind: str
    detail: str


def tries(every: int, first: int, word: str) -> Iterator[tuple[str, Call, str, Try]]:
    """Name, callable, argument and what it is given: every K-th of all, and other ones for each."""
    calls = public_calls.calls()
    for name, call in calls.items():
        if word not in name:
            continue
        arguments = call.arguments()
        for parameter, kind in public_calls.kinds_of(call).items():
            if kind is None:
                continue
            start = zlib.crc32(f"{name}({parameter}".encode()) - first
            for number, attempt in enumerate(kind(arguments.get(parameter)), start):
                if number % every == 0:
                    yield name, call, parameter, attempt


def answers(every: int = 1, first: int = 0, word: str = "") -> list[Answer]:
    """The answers to every K-th try, from a process of their own; `first` chooses which."""
    found: list[Answer] = []
    skipped = 0
    while True:
        done, hung = _run_worker(every, first, word, skipped, found)
        if done:
            return found
        found.append(Answer(hung, "hang", f"no answer within {SECONDS:g} s"))
        skipped = len(found)


def _run_worker(
    every: int, first: int, word: str, skipped: int, found: list[Answer]
) -> tuple[bool, str]:
    """Add the answers of a process; whether it came to its end, else the call that it was in."""
    command = [sys.executable, __file__, "--worker", "--every", str(every)]
    command += ["--first", str(first), "--only", word]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--skip", str(skipped)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=environment | {"PYFLOCALITY_CACHE_DIR": folder},
            cwd=folder,
        )
        current, ready = "at the start", selectors.DefaultSelector()
        ready.register(process.stdout, selectors.EVENT_READ)
        try:
            pending = b""
            patience = 120.0
            while ready.select(patience):
                chunk = os.read(process.stdout.fileno(), 2**16)
                if not chunk:
                    process.wait()
                    if process.returncode == 0:
                        return True, ""
                    return False, f"{current} (ended by {process.returncode})"
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    patience = SECONDS
                    message = json.loads(line)
                    if isinstance(message, str):
                        current = message
                    else:
                        found.append(Answer(*message))
            return False, current
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def work(every: int, first: int, word: str, skip: int) -> None:
    """What the process does: make the calls, and tell their answers line by line."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = tries(every, first, word)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    expected: dict[str, object] = {}

    def tell(message: object) -> None:
        print(json.dumps(message), file=output, flush=True)

    for name, call, parameter, attempt in itertools.islice(chosen, skip, None):
        case = f"{name}({parameter}={attempt.label})"
        tell(case)
        if name not in expected:
            try:
                expected[name] = sound_answer(call)
            except Exception as error:
                tell([case, "deep", f"the sound call ends in {error!r}"])
                continue
        tell([case, *judge(call, parameter, attempt, expected[name])])


def sound_answer(call: object) -> object:
    """What the sound call answers, or its BackendUnavailableError."""
    torch.manual_seed(0)
    try:
        return call.function(**call.arguments())
    except (pf.BackendUnavailableError, ValueError) as error:
        if isinstance(error, pf.BackendUnavailableError) or "torchrun" in str(error):
            return error
        raise


def judge(call: object, parameter: str, attempt: object, expected: object) -> tuple[str, str]:
    """Kind and detail of the answer to one try."""
    arguments = call.arguments() | {parameter: attempt.value}
    torch.manual_seed(0)
    start = time.process_time()
    with pf.trace_backends() as trace, _decompositions(trace):
        try:
            answer = call.function(**arguments)
        except pf.BackendUnavailableError as error:
            return (
                ("refused", "")
                if attempt.verdict != "wrong"
                or "cuda" in str(call.function)
                or parameter == "backend"
                else ("refused", str(error))
            )
        except Exception as error:
            took = time.process_time() - start
            return _judge_error(call, attempt.value, error, trace, took)
    if attempt.verdict == "wrong":
        return "silent", _shown(answer)
    if not call.infinite and not _is_finite(answer):
        return "not finite", _shown(answer)
    if attempt.verdict == "same" and not isinstance(expected, Exception):
        if not is_close(answer, expected):
            return "different", _shown(answer)
    return "taken", ""


def _letters(text: str) -> str:
    """Without what is escaped where it is shown."""
    return "".join(filter(str.isalnum, text))


def _judge_error(
    call: object, value: object, error: Exception, trace: list, took: float
) -> tuple[str, str]:
    text = str(error)
    detail = f"{type(error).__name__}: {text[:200]}"
    documented = _documented(call)
    plain = type(error) in (ValueError, TypeError)
    if not plain and not any(base.__name__ in documented for base in type(error).__mro__[:-2]):
        return "deep", detail
    if plain and not _is_ours(error):
        return "deep", detail
    if not set(re.findall(r"`(\w+)[`(\[.]", text)) & set(call.parameters()) | call.names:
        # A file that is not as it should be is named by its path.
        is_path = isinstance(value, (str, os.PathLike))
        is_named_path = is_path and _letters(text).startswith(_letters(os.fspath(value)))
        named = isinstance(error, OSError) or "torchrun" in text or is_named_path
        if not named:
            return "unnamed", detail
    if trace:
        return "late", f"{detail} after {trace[:3]}"
    if took > SLOW:
        return "late", f"{detail} after {took:.1f} s"
    return "refused", ""


def _is_ours(error: Exception) -> bool:
    """Whether the library raised the error itself, not Python, NumPy or torch inside of it."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    path = Path(traceback.tb_frame.f_code.co_filename)
    if not any(path.is_relative_to(place) for place in OURS):
        return False
    lines = [
        linecache.getline(str(path), number)
        for number in range(traceback.tb_lineno - 12, traceback.tb_lineno + 1)
    ]
    return any("raise" in line for line in lines)


def _documented(call: object) -> str:
    function = call.signature or call.function
    doc = inspect.getdoc(function) or ""
    return doc.partition("Raises:")[2].partition("References:")[0]


@contextlib.contextmanager
def _decompositions(trace: list) -> Iterator[None]:
    """Notes in a trace that an eigendecomposition was begun: work that comes behind all checks."""
    plain = torch.linalg.eigh

    def noted(*arguments: object, **options: object) -> object:
        trace.append(("eigh", "torch"))
        return plain(*arguments, **options)

    torch.linalg.eigh = noted
    try:
        yield
    finally:
        torch.linalg.eigh = plain


def _leaves(answer: object) -> Iterator[object]:
    """Tensors and numbers inside an answer."""
    import dataclasses

    if isinstance(answer, (torch.Tensor, float, int)):
        yield answer
    elif isinstance(answer, (list, tuple)):
        for part in answer:
            yield from _leaves(part)
    elif isinstance(answer, dict):
        yield from _leaves(list(answer.values()))
    elif dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        yield from _leaves([getattr(answer, field.name) for field in dataclasses.fields(answer)])
    elif hasattr(answer, "images") and isinstance(answer.images, torch.Tensor):
        yield answer.images


def _is_finite(answer: object) -> bool:
    import math

    for leaf in _leaves(answer):
        if isinstance(leaf, torch.Tensor):
            if not _is_dense(leaf):
                return False
            if leaf.is_floating_point() and not torch.isfinite(leaf.detach().double()).all():
                return False
        elif not (isinstance(leaf, int) or math.isfinite(leaf)):
            return False
    return True


def _is_dense(leaf: torch.Tensor) -> bool:
    """Whether a tensor holds numbers that can be compared."""
    is_odd = leaf.is_nested or leaf.is_quantized or leaf.is_meta
    return leaf.layout == torch.strided and not is_odd


def is_close(answer: object, expected: object) -> bool:
    mine, theirs = list(_leaves(answer)), list(_leaves(expected))
    if len(mine) != len(theirs):
        return False
    for one, other in zip(mine, theirs, strict=True):
        if not all(_is_dense(leaf) for leaf in (one, other) if isinstance(leaf, torch.Tensor)):
            return False
        # A number and a tensor of it are the same answer.
        a, b = (torch.as_tensor(leaf).detach().as_subclass(torch.Tensor) for leaf in (one, other))
        a, b = a.double(), b.double()
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True):
            return False
    return True


def _shown(answer: object) -> str:
    try:
        return repr(answer).replace("\n", " ")[:120]
    except Exception:
        return f"a {type(answer).__name__}"


def main() -> None:
    """Count the answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--show", action="store_true", help="list what was answered wrongly")
    options = parser.parse_args()
    if options.worker:
        work(options.every, options.first, options.only, options.skip)
        return
    start = time.monotonic()
    found = answers(options.every, options.first, options.only)
    if options.show:
        for answer in found:
            if answer.kind not in GOOD:
                print(f"{answer.kind:<10} {answer.case[:110]} | {answer.detail}")
    counts = collections.Counter(answer.kind for answer in found)
    print(f"{len(found)} calls in {time.monotonic() - start:.0f} s: {dict(counts.most_common())}")


if __name__ == "__main__":
    main()
