"""The pool of large tensors: whatever lies in it keeps its values, and what is free is used again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cyborg_torchrl import tensor_pool

needs_pool = pytest.mark.skipif(tensor_pool.library() is None, reason="it was not built here (Linux, beside torch)")

# an allocator is never taken out again: each program has a process of its own, forked from one that has imported all
FORKING = """
import json, os, sys, traceback
from pathlib import Path
import torch
from cyborg_torchrl import tensor_pool

torch.set_num_threads(1)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

for line in sys.stdin:
    receive, send = os.pipe()
    if os.fork() == 0:
        here = {"torch": torch, "tensor_pool": tensor_pool, "resident": resident}
        try:
            exec(json.loads(line), here)
        except BaseException:
            here["result"] = traceback.format_exc()
        os.write(send, json.dumps(here["result"]).encode())
        os._exit(0)
    os.close(send)
    with open(receive) as answer:
        print(answer.read() or '"it died"', flush=True)
"""


@pytest.fixture(scope="module")
def result_of() -> Iterator[Callable[[str], object]]:
    """`result` of a program, as JSON can say it."""
    with subprocess.Popen([sys.executable, "-c", FORKING], stdin=-1, stdout=-1, text=True) as process:

        def run(program: str) -> object:
            print(json.dumps(textwrap.dedent(program)), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@needs_pool
def test_large_tensors_lie_in_it_and_small_ones_do_not(result_of: Callable) -> None:
    program = """
        before = torch.zeros(2**20)
        installed = [tensor_pool.install(), tensor_pool.install()]
        figures = [tensor_pool.bytes_in_use()]
        small, large = torch.zeros(2**13), torch.zeros(2**20)
        figures.append(tensor_pool.bytes_in_use())
        del before, small
        figures.append(tensor_pool.bytes_in_use())
        empty = torch.empty(0)
        large.resize_(2**21)
        figures.append(tensor_pool.bytes_in_use())
        del large
        figures.append(tensor_pool.bytes_in_use())
        result = [installed, figures]
    """
    installed, figures = result_of(program)
    assert installed == [True, True]
    assert [round(figure / 2**20) for figure in figures] == [0, 4, 4, 8, 0]
    assert figures[0] == figures[-1] == 0


@needs_pool
def test_values_stay_where_tensors_of_all_sizes_come_and_go_on_several_threads(result_of: Callable) -> None:
    program = """
        import random, threading
        tensor_pool.install()
        wrong = []

        def work(seed):
            draw, held = random.Random(seed), []
            for i in range(1500):
                if held and draw.random() < 0.5:
                    tensor, value = held.pop(draw.randrange(len(held)))
                    if tensor.data_ptr() % 64 or not bool((tensor == value).all()):
                        wrong.append([seed, i])
                else:
                    size = int(2 ** draw.uniform(0, 20))
                    value = draw.randrange(2**31)
                    held.append((torch.full((size,), value, dtype=torch.int32), value))
                if i % 100 == 0:
                    tensor_pool.release(everything=i % 200 == 0)
            wrong.extend([seed, "end"] for tensor, value in held if not bool((tensor == value).all()))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        result = [wrong, tensor_pool.bytes_in_use()]
    """
    assert result_of(program) == [[], 0]


@needs_pool
def test_what_is_free_is_used_again_lowest_first(result_of: Callable) -> None:
    program = """
        tensor_pool.install()
        blocks = [torch.empty(2**18) for _ in range(6)]
        at = [block.data_ptr() for block in blocks]
        figures = [at == sorted(at)]
        blocks[1] = blocks[2] = blocks[4] = None
        figures.append(torch.empty(2**18).data_ptr() == at[1])  # of 1 to 2 and 4: the lowest
        figures.append(torch.empty(2**19).data_ptr() == at[1])  # two neighbours are one
        both = torch.empty(2**18), torch.empty(2**18), torch.empty(2**18)
        figures.append([each.data_ptr() for each in both] == [at[1], at[2], at[4]])
        del blocks, both
        figures.append(torch.empty(2**22).data_ptr() == at[0])  # all of it is one again
        result = figures
    """
    assert result_of(program) == [True] * 5


@needs_pool
def test_memory_goes_back_to_the_system(result_of: Callable) -> None:
    program = """
        tensor_pool.install()
        start = resident()
        blocks = [torch.full((2**21,), float(i)) for i in range(50)]  # 8 MiB each
        figures = [resident() - start]
        kept = blocks[:1] + blocks[20:21]
        del blocks
        released = [tensor_pool.release()]  # all of them were there since the last call: nothing
        figures.append(resident() - start)
        released.append(tensor_pool.release())  # above block 20
        figures.append(resident() - start)
        released.append(tensor_pool.release(everything=True))  # and between
        figures.append(resident() - start)
        same = [[float(block.min()), float(block.max())] for block in kept]
        again = torch.full((2**23,), 3.0)
        same.append([float(again.min()), float(again.max())])
        result = [figures, [each / 2**20 for each in released], same]
    """
    figures, released, same = result_of(program)
    assert figures == pytest.approx([400, 400, 168, 16], abs=8)
    assert released == pytest.approx([0, 232, 152], abs=1)
    assert same == [[0.0, 0.0], [20.0, 20.0], [3.0, 3.0]]


@needs_pool
def test_a_child_that_was_forked_goes_on_with_it(result_of: Callable) -> None:
    program = """
        import os, threading, warnings
        tensor_pool.install()
        ends = False

        def churn():
            while not ends:
                torch.empty(2**18)

        held = torch.full((2**18,), 7.0)
        thread = threading.Thread(target=churn)
        thread.start()
        codes = []
        warnings.simplefilter("ignore")
        for i in range(20):
            child = os.fork()
            if child == 0:
                mine = torch.full((2**18,), float(i))
                held.add_(1.0)
                os._exit(0 if float(mine.sum()) == i * 2**18 and float(held.sum()) == 8 * 2**18 else 1)
            codes.append(os.waitpid(child, 0)[1])
        ends = True
        thread.join()
        result = [codes, float(held.sum())]
    """
    assert result_of(program) == [[0] * 20, 7.0 * 2**18]


@needs_pool
def test_the_profiler_sees_it(result_of: Callable) -> None:
    program = """
        tensor_pool.install()
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.empty(2**20)
        events = profile.key_averages()
        result = sum(event.self_cpu_memory_usage for event in events if event.key == "aten::empty")
    """
    assert result_of(program) == 2**22


@needs_pool
def test_where_addresses_are_limited_all_is_as_it_was(result_of: Callable) -> None:
    program = """
        import resource
        from pathlib import Path
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        installed = tensor_pool.install()
        tensor = torch.ones(2**20)
        result = [installed, float(tensor.sum()), tensor_pool.bytes_in_use(), tensor_pool.release()]
    """
    assert result_of(program) == [False, 2.0**20, 0, 0]


@needs_pool
@pytest.mark.parametrize("resource", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_that_would_have_room_for_it_is_left_to_the_rest_of_the_process(
    resource: str, result_of: Callable
) -> None:
    program = f"""
        import resource
        resource.setrlimit(resource.{resource}, (2**45, 2**45))
        result = [tensor_pool.install(), float(torch.ones(2**20).sum())]
    """
    assert result_of(program) == [False, 2.0**20]


@needs_pool
def test_it_can_be_switched_off(result_of: Callable) -> None:
    program = """
        import os
        os.environ[tensor_pool.SWITCH] = "0"
        result = [tensor_pool.install(), tensor_pool.bytes_in_use()]
    """
    assert result_of(program) == [False, 0]


@needs_pool
@pytest.mark.parametrize("size", [-1, -64, -255, -256, -(2**62)])
def test_a_size_below_zero_is_refused_in_torchs_words(size: int, result_of: Callable) -> None:
    program = f"""
        tensor_pool.install()
        neighbour, storage = torch.full([2**20], 3.0), torch.ones(2**20).untyped_storage()
        try:
            storage.resize_({size})
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
        result = [said, neighbour.unique().tolist(), tensor_pool.bytes_in_use() > 2**22]
    """
    said, values, is_in_use = result_of(program)
    assert "nbytes" in said or "negative" in said
    assert values == [3.0]
    assert is_in_use


@needs_pool
def test_tensors_lie_where_a_list_of_what_is_free_says(result_of: Callable) -> None:
    """First fit in order of address, against a plain list; then all of it is one free piece again."""
    program = """
        import random
        random.seed(0)
        tensor_pool.install()
        begin = torch.empty(2**20).data_ptr()
        free, held, wrong = [[begin, 2**40]], {}, 0
        for turn in range(3000):
            if held and random.random() < 0.48:
                address = random.choice(list(held))
                tensor, size = held.pop(address)
                del tensor
                free.append([address, size])
                free.sort()
                joined = []
                for piece in free:
                    if joined and sum(joined[-1]) == piece[0]:
                        joined[-1][1] += piece[1]
                    else:
                        joined.append(piece)
                free = joined
            else:
                asked = random.randrange(2**16, 2**19)
                size = -(-asked // 64) * 64 + 192
                piece = next(piece for piece in free if piece[1] >= size)
                tensor = torch.empty(asked, dtype=torch.uint8)
                wrong += tensor.data_ptr() != piece[0]
                held[piece[0]] = tensor, size
                piece[0], piece[1] = piece[0] + size, piece[1] - size
        in_use = tensor_pool.bytes_in_use() == sum(size for _, size in held.values())
        held.clear()
        del tensor
        result = [wrong, in_use, tensor_pool.bytes_in_use(), torch.empty(2**24).data_ptr() == begin]
    """
    assert result_of(program) == [0, True, 0, True]


@needs_pool
def test_what_does_not_fit_is_refused_in_torchs_words(result_of: Callable) -> None:
    program = """
        tensor_pool.install()
        try:
            torch.empty(2**50)
        except RuntimeError as error:
            said = str(error)
        result = [said, float(torch.ones(2**20).sum())]
    """
    said, total = result_of(program)
    assert "DefaultCPUAllocator" in said
    assert total == 2.0**20


def test_a_library_of_an_older_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no compiler")
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    version = torch.__version__.partition("+")[0]
    source.write_text(f'extern "C" const char* cyborg_pool_built_for() {{ return "{version}"; }}')
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(tensor_pool, "LIBRARY", library)
    tensor_pool.library.cache_clear()
    assert not tensor_pool.install()
    tensor_pool.library.cache_clear()


def test_what_was_built_for_another_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_pool.library.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.13.99+cpu")
    assert tensor_pool.library() is None
    assert not tensor_pool.install()
    assert (tensor_pool.release(), tensor_pool.bytes_in_use()) == (0, 0)
    tensor_pool.library.cache_clear()
