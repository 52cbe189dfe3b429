"""The paper's tables in miniature, in under an hour on two CPU cores, without a network.

    python experiments/mini/run.py

Each method's learning rate is chosen on problems and seeds of their own, from as many as any other method's; then it is
trained on ten seeds and judged on held-out problems. Each training leaves one record in `OUTPUT/jobs`: a run that was
stopped goes on with the same command. Results, tables and figures are written to OUTPUT; `--publish` writes those of
the repository, and the tables in docs/miniature.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "examples"), str(HERE.parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import records  # noqa: E402
from mini.plan import HELD_OUT, LARGE, TABLES, Training, Use  # noqa: E402
from mini.report import publish, write_report  # noqa: E402
from mini.results import write_results  # noqa: E402
from mini.work import Counts, Job, Place, do, solutions  # noqa: E402

TUNING_SEED = 1000
"""The first seed that rates are chosen on; those of the figures count from 0."""

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny = [name for name, table in TABLES.items() if all(row.training.model != LARGE for row in table.rows)]
    parser.add_argument("--tables", nargs="+", choices=[*TABLES], metavar="TABLE", default=tiny)
    parser.add_argument("--device", default="cpu", help="one that all workers share")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights")
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun; the same command goes on")
    parser.add_argument("--output", type=Path, default=Path("miniature-output"), help="folder for all that is written")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--publish", action="store_true", help="write the repository's results and page as well")
    for count in fields(Counts):
        parser.add_argument(f"--{count.name.replace('_', '-')}", type=int, default=count.default)
    return parser.parse_args(words)


def uses_of_trainings() -> dict[Training, tuple[Use, ...]]:
    """The trainings of all tables, each once, and all that is measured of each, for whichever table."""
    found: dict[Training, dict[Use, None]] = {}
    for table in TABLES.values():
        for row in table.rows:
            found.setdefault(row.training, {}).update(dict.fromkeys((row.use, *row.also)))
    return {training: tuple(uses) for training, uses in found.items()}


def seeds_of_trainings(tables: Iterable[str], most: int) -> dict[Training, range]:
    """The trainings of some tables, and their seeds: as many as the table with most of them asks for."""
    found: dict[Training, int] = {}
    for table in (TABLES[name] for name in tables):
        for row in table.rows:
            number = 1 if row.training.method == "base" else min(most, table.seeds)
            found[row.training] = max(found.get(row.training, 0), number)
    return {training: range(number) for training, number in found.items()}


def tuning_seeds_of(trainings: Iterable[Training], most: int) -> dict[Training, range]:
    """The seeds that the rates of trainings are chosen on, the same whichever tables are asked for.

    Args:
        trainings: Of any number of solutions.
        most: How many there are for what has as many seeds as any table has; with half as many it is half of them.
    """
    whole = max(table.seeds for table in TABLES.values())
    seeds = seeds_of_trainings(TABLES, whole)
    return {
        training.tuning: range(TUNING_SEED, TUNING_SEED + math.ceil(most * len(seeds[training.tuning]) / whole))
        for training in trainings
        if training.is_trained
    }


def check_folder(folder: Path, counts: Counts, place: Place) -> None:
    """Notes what figures of a folder depend on, but for the number of seeds, which may grow.

    Raises:
        ValueError: If something else is in it: the report is on all that is there.
    """
    settings = {name: value for name, value in asdict(counts).items() if name != "seeds"} | {"dtype": place.dtype}
    path = folder / "settings.json"
    if not path.exists():
        records.write(path, settings, {}, place.device)
    elif others := records.differences(records.read(path)["arguments"], settings):
        raise ValueError(f"{folder} was made with {others}. Write to another --output.")


def prepare_worker() -> None:
    """One thread a process, for the models are too small for more; no notices of what is as it should be."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


class Workers:
    """Processes that make calls.

    Args:
        number: How many; with one, this process makes them.
        deadline: In the seconds of `time.monotonic`, when the last call may begin.
    """

    def __init__(self, number: int, deadline: float = math.inf) -> None:
        self.number, self.deadline = number, deadline

    def __enter__(self) -> Workers:
        self._pool = None
        if self.number == 1:
            prepare_worker()
        else:
            self._pool = ProcessPoolExecutor(self.number, get_context("spawn"), initializer=prepare_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def make(self, calls: Iterable[Call], description: str) -> list[Any]:
        """Makes calls, and gives what they return, in order: None of those for which there was no time.

        The first that fails stops all.
        """
        calls = list(calls)
        if self._pool is None:
            return [
                function(*arguments) if time.monotonic() < self.deadline else None
                for function, arguments in tqdm(calls, desc=description)
            ]
        results: list[Any] = [None] * len(calls)
        waiting, running = deque(enumerate(calls)), dict[Future[Any], int]()
        with tqdm(total=len(calls), desc=description, mininterval=1) as progress:
            while running or waiting:
                while waiting and len(running) < self.number and time.monotonic() < self.deadline:
                    number, (function, arguments) = waiting.popleft()
                    running[self._pool.submit(function, *arguments)] = number
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)] = future.result()
                    progress.update()
        return results


def best_rate(shares: dict[float, float]) -> float:
    """The rate with the highest share of problems solved; of equals the one whose neighbours do best, then the lowest.

    A method often solves everything at several rates: the one in their midst is the safest for other seeds.
    """
    rates = sorted(shares)

    def merit(place: int) -> tuple[float, float]:
        neighbours = [shares[rates[other]] for other in (place - 1, place + 1) if 0 <= other < len(rates)]
        return shares[rates[place]], statistics.mean(neighbours) if neighbours else 0.0

    return rates[max(range(len(rates)), key=merit)]


def best_rates(seeds: dict[Training, range], workers: Workers, *where: Path | Counts | Place) -> dict[Training, float]:
    """The `best_rate` of each training, by the validation problems that it solves, mean over seeds.

    Raises:
        TimeoutError: If the time was over before all rates were tried.
    """
    counts = next(each for each in where if isinstance(each, Counts))
    jobs = [
        Job(training, rate, seed, (HELD_OUT,), tuning=True)
        for training, own in seeds.items()
        for seed in own
        for rate in training.rates[: counts.rates]
    ]
    found = workers.make([(do, (job, *where)) for job in jobs], "choosing rates")
    if None in found:
        raise TimeoutError(
            f"{found.count(None)} of {len(jobs)} trainings that choose rates are left. The same command goes on."
        )
    scores: dict[Training, dict[float, list[float]]] = {}
    for job, record in zip(jobs, found, strict=True):
        scores.setdefault(job.training, {}).setdefault(job.rate, []).append(record["result"][HELD_OUT.name])
    return {
        training: best_rate({rate: statistics.mean(found) for rate, found in of_rates.items()})
        for training, of_rates in scores.items()
    }


def main(words: list[str] | None = None) -> None:
    """Solutions, rates, trainings, results, report."""
    arguments = parse(words)
    counts = Counts(**{count.name: getattr(arguments, count.name) for count in fields(Counts)})
    folder = arguments.output
    where = (folder, counts, Place(arguments.device, arguments.dtype))
    uses, seeds = uses_of_trainings(), seeds_of_trainings(arguments.tables, counts.seeds)
    tuning_seeds = tuning_seeds_of(seeds, counts.tuning_seeds)
    check_folder(*where)
    needed = dict.fromkeys(
        (training.model, training.data, seed)
        for training, own in seeds.items()
        if training.method != "base"
        for seed in (*tuning_seeds.get(training.tuning, ()), *own)
    )
    deadline = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with Workers(arguments.workers, deadline) as workers:
        workers.make([(solutions, (*each, *where)) for each in needed], "collecting solutions")
        rates = best_rates(tuning_seeds, workers, *where)
        jobs = [
            Job(training, rates[training.tuning] if training.is_trained else None, seed, uses[training])
            for training, own in seeds.items()
            for seed in own
        ]
        jobs.sort(key=lambda job: job.seed)  # when time runs out, all methods have equally many
        found = workers.make([(do, (job, *where)) for job in jobs], "training and measuring")
    if None in found:
        print(f"{found.count(None)} of {len(jobs)} trainings are left. The same command goes on.")

    write_results(folder / "jobs", folder / "results")
    write_report(folder / "results", folder / "report")
    print(f"Tables and figures are in {folder / 'report'}.")
    if arguments.publish:
        publish(folder / "results")


if __name__ == "__main__":
    main()
