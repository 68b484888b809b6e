"""Run cases in turn, each in a process that works only on request, so that all see the same state of the machine."""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moe_bsr.benchmark.cases import Case, make
from moe_bsr.benchmark.kineto import quiet_kineto
from moe_bsr.benchmark.matmuls import step_products, time_products
from moe_bsr.benchmark.measure import inference_peak, kept_for_backward, measure
from moe_bsr.training.update import TrainingStep


class BenchmarkWorker:
    """A case in a process of its own. It is spawned rather than forked, to have a fresh allocator."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, case), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, job: str, *arguments: Any) -> Any:
        """Run a job of `JOBS` in the process and return its result.

        Raises:
            RuntimeError: the job failed, or the process died (out of memory).
        """
        try:
            self._pipe.send((job, arguments))
            failed, result = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise RuntimeError(
                f"{self.case.name}: its process died with status {self._process.exitcode}. If memory ran out, use a "
                "smaller batch"
            ) from error
        if failed:
            raise RuntimeError(f"{self.case.name}: {result}")
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def workers(cases: list[Case]) -> Iterator[list[BenchmarkWorker]]:
    """Context with one process per case, warmed up one after the other and closed at the end."""
    started = [BenchmarkWorker(case) for case in cases]
    try:
        for worker in started:
            worker.ask("seconds", 2)
        yield started
    finally:
        for worker in started:
            worker.close()


def interleave(group: list[BenchmarkWorker], rounds: int, steps: int) -> list[list[list[float]]]:
    """Run `steps` steps of each worker in turn, `rounds` times. Return seconds by worker, round and step.

    A worker's first step in a round has cold caches. It is timed like the others.
    """
    by_round = [[worker.ask("seconds", steps) for worker in group] for _ in range(rounds)]
    return [list(of_worker) for of_worker in zip(*by_round, strict=True)]


def _serve(pipe: Connection, case: Case) -> None:
    try:
        step, failure = make(case), None
    except Exception as error:  # reported at the parent's first request
        failure = f"{type(error).__name__}: {error}"
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        if failure is not None:
            pipe.send((True, failure))
            continue
        try:
            pipe.send((False, JOBS[job](case, step, *arguments)))
        except Exception as error:
            pipe.send((True, f"{type(error).__name__}: {error}"))


def seconds(case: Case, step: TrainingStep, steps: int) -> list[float]:
    """Return the wall-clock seconds of each of `steps` whole steps."""
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        step.run()
        if step.runtime.device.type == "cuda":
            torch.cuda.synchronize(step.runtime.device)
        taken.append(time.perf_counter() - began)
    return taken


def memory(case: Case, step: TrainingStep) -> dict[str, Any]:
    """Measure the memory of a step in bytes (see `Measured`), and the peak of a forward pass under no_grad.

    `kept_per_image` is the difference between half the batch and all of it, per image, which excludes copies of
    weights. `weights` counts every parameter in the dtype of the computation.
    """
    seen = dataclasses.asdict(measure(step))
    del seen["at_peak"]
    half = case.batch // 2
    kept, _ = kept_for_backward(make(dataclasses.replace(case, batch=half)))
    growth = seen["kept"] - sum(a.bytes for a in kept)
    size = 2 if step.runtime.precision == "bf16" else 4
    return seen | {
        "kept_per_image": growth / (case.batch - half),
        "inference_peak": inference_peak(step),
        "weights": size * sum(p.numel() for p in step.model.parameters()),
    }


def products(case: Case, step: TrainingStep) -> dict[str, Any]:
    """Return the FLOPs of the step's matrix products, and the sum of their best isolated times in seconds."""
    counted = step_products(step)
    best = time_products(counted, step.runtime.device)
    return {
        "flops": sum(p.flops * n for p, n in counted.items()),
        "seconds": sum(best[p] * n for p, n in counted.items()),
        "shapes": [
            [dataclasses.asdict(p), n, best[p]]
            for p, n in sorted(counted.items(), key=lambda item: -best[item[0]] * item[1])
        ],
    }


def hot_spots(case: Case, step: TrainingStep, rows: int = 10) -> list[tuple[str, float, int]]:
    """Return the operators with the largest self time: (name, milliseconds per step, calls per step)."""
    step.run()
    with quiet_kineto(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step.run()
    averages = sorted(profiler.key_averages(), key=lambda a: -a.self_cpu_time_total)[:rows]
    return [(a.key, a.self_cpu_time_total / 3e3, round(a.count / 3)) for a in averages]


JOBS: dict[str, Callable[..., Any]] = {
    "seconds": seconds,
    "memory": memory,
    "products": products,
    "hot_spots": hot_spots,
}
