"""Runs side by side: finished ones are kept, failed ones are named, Ctrl-C loses only what was under way."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.results import read_json, write_json

__all__ = ["finished", "run_all"]

Run = Callable[..., dict[str, Any]]


def finished(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a result is there already.

    Args:
        path: of its JSON.
        wanted: what it must hold, such as the setting that this command has.

    Raises:
        ValueError: it is there and damaged, or holds something else.
    """
    if not path.exists():
        return False
    stored = read_json(path)
    if different := sorted(_differences(stored, wanted)):
        raise ValueError(
            f"output: expected results with this command's setting, got {path} with another ({', '.join(different)}); delete it, "
            "or pass another --output"
        )
    return True


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Names of what differs, the innermost ones."""
    for name, value in wanted.items():
        own = stored.get(name)
        if own != value:
            inner = list(_differences(own, value)) if isinstance(own, dict) and isinstance(value, dict) else []
            yield from inner or [name]


def run_all(run: Run, waiting: Mapping[Path, tuple[Any, ...]], jobs: int, threads: int, console: Console) -> None:
    """Run what is not finished, with a progress bar, and write each result as it comes.

    Args:
        run: arguments → what the JSON holds; a function of a module, since other processes import it.
        waiting: where a result goes → arguments.
        jobs: runs at a time, each in a process of its own; 1 runs them here, one after the other.
        threads: of each run.
        console: to print on.

    Raises:
        ValueError: some failed; the others were finished first.
    """
    failed: dict[str, BaseException] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        # Closed at once, wherever Ctrl-C comes: a traceback would keep it, and its processes, alive.
        with (
            closing(_ended(run, waiting, jobs, threads)) as ended,
            Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        ):
            bar = progress.add_task(f"{min(jobs, max(1, len(waiting)))} at a time", total=len(waiting))
            for path, future in ended:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):  # those that wait for it have done nothing wrong
                    raise error
                if error is None:
                    write_json(path, future.result())
                else:
                    failed[path.stem] = error
                    console.print(f"failed {path.stem}: {type(error).__name__}: {error}", markup=False)
                progress.update(bar, advance=1, description=path.stem)
    except KeyboardInterrupt:
        console.print("\nstopped; finished runs are kept, and the same command again resumes")
        sys.exit(130)
    except BrokenProcessPool:
        raise ValueError(
            "runs: expected every process to live, got one that was killed (out of memory?); finished runs are kept: run the "
            "same command again, with a lower --jobs"
        ) from None
    if failed:
        name, error = next(iter(failed.items()))
        raise ValueError(
            f"runs: expected all to finish, got {len(failed)} that failed ({', '.join(failed)}; {name}: {error}); mend the "
            "cause and run the same command again"
        )


def _ended(
    run: Run, waiting: Mapping[Path, tuple[Any, ...]], jobs: int, threads: int
) -> Generator[tuple[Path, Future[dict[str, Any]]], None, None]:
    """Runs as they end."""
    if jobs == 1 or len(waiting) < 2:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for path, arguments in waiting.items():
                yield path, _here(run, arguments)
        finally:
            torch.set_num_threads(before)
        return
    # Spawned: a forked torch may hang where its parent has used threads. They stay, so that each imports it once.
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(waiting)), spawned, initializer=_start, initargs=(threads,))
    try:
        futures = {pool.submit(run, *arguments): path for path, arguments in waiting.items()}
        for future in as_completed(futures):
            yield futures[future], future
    except BaseException:
        for process in list(pool._processes.values()):  # they would go on with what is of no use to anyone
            process.kill()  # Lightning's trainer lives on after SIGTERM
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _here(run: Run, arguments: tuple[Any, ...]) -> Future[dict[str, Any]]:
    future: Future[dict[str, Any]] = Future()
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            future.set_result(run(*arguments))
    except SystemExit:  # how Lightning's trainer ends on Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        future.set_exception(error)
    finally:
        lightning.setLevel(level)
    return future


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends these
    torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
