"""Tokenise much text: memory, time, all cores beside one, and kills; see benchmarks/README.md.

    python benchmarks/data/run.py [--only NAME] [--quick]

The text is made from the Python sources of this machine.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from corpus import write_lines, write_text

from common.command import chosen, folder_of_results
from common.promises import Row, record_promises
from common.table import Result
from skippipe.config.data_options import DataOptions
from skippipe.data.sources import text_pieces
from skippipe.data.tokenizer import build_tokenizer, save_for_transformers

HERE = Path(__file__).resolve().parent
PEAK_GIB = 2.0
ROUNDS = 5
VOCABULARY = 4096
NO_THREADS = {"TOKENIZERS_PARALLELISM": "false"}


class Corpora:
    """The texts of the rows, made where they are first needed, and a tokenizer that is there before."""

    def __init__(self, folder: Path, scale: int) -> None:
        self._folder, self._scale = folder, scale

    def text(self, num_bytes: int) -> dict[str, Any]:
        """Return the options of a corpus of text files."""
        folder = self._folder / f"text-{num_bytes}"
        if not folder.exists():
            write_text(folder, num_bytes // self._scale, seed=0)
        return {"source": "text", "paths": [str(folder)]}

    def lines(self, num_lines: int) -> dict[str, Any]:
        """Return the options of a corpus of JSON lines."""
        folder = self._folder / f"lines-{num_lines}"
        if not folder.exists():
            write_lines(folder, num_lines // self._scale, seed=0)
        return {"source": "jsonl", "paths": [str(folder)]}

    def tokenizer(self) -> str:
        """Return the folder of a byte-pair encoding that was trained on Python's own sources."""
        folder = self._folder / "tokenizer"
        if not folder.exists():
            options = DataOptions(source="python_stdlib", tokenizer=f"bpe:{VOCABULARY}", max_bytes=2_000_000)
            folder.mkdir()
            save_for_transformers(options, build_tokenizer(options, text_pieces(options)), folder)
        return str(folder)

    def cache(self) -> str:
        """Return an empty folder for one token cache, in the place of the last one."""
        folder = self._folder / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        return str(folder)


def started(options: dict[str, Any], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start one process that makes a token cache."""
    command = [sys.executable, str(HERE / "attempt.py"), json.dumps(options)]
    return subprocess.Popen(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a process says that has made a token cache."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"no token cache was made (exit code {process.returncode})")
    return dict(json.loads(output.splitlines()[-1]))


def whole(corpora: Corpora, corpus: Callable[[Corpora], dict[str, Any]], tokenizer: str | None) -> Result:
    """Tokenise all of a corpus once."""
    options = corpus(corpora) | {"tokenizer": tokenizer or corpora.tokenizer(), "cache_dir": corpora.cache()}
    size_bytes = sum(path.stat().st_size for path in Path(options["paths"][0]).iterdir())
    done = finished(started(options))
    corpora.cache()
    reading = done["reading_s"] / done["cpu_s"]
    return {
        "text": f"{size_bytes / 1e9:.2f} GB",
        "tokens": f"{done['tokens'] / 1e6:,.0f} million",
        "peak memory": f"{done['peak_gib']:.2f} GiB",
        "time": f"{done['wall_s']:,.0f} s ({size_bytes / 1e6 / done['wall_s']:.1f} MB/s)",
        "processor time": f"{done['cpu_s']:,.0f} s ({reading:.0%} of it in the thread that reads)",
        "met": done["peak_gib"] <= PEAK_GIB,
    }


def all_cores_beside_one(corpora: Corpora, rounds: int) -> Result:
    """Tokenise the same text on all cores and on one, in turn."""
    options = corpora.text(20_000_000) | {"tokenizer": corpora.tokenizer()}
    ratios, fingerprints = [], set()
    for number in range(rounds):
        times_s = {}
        for environment in ([NO_THREADS, {}], [{}, NO_THREADS])[number % 2]:
            done = finished(started(options | {"cache_dir": corpora.cache()}, environment))
            times_s[bool(environment)] = done["wall_s"]
            fingerprints.add(done["fingerprint"])
        ratios.append(times_s[True] / times_s[False])
    return {
        "rounds": rounds,
        "times as fast, median": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "different caches": len(fingerprints) - 1,
        "met": len(fingerprints) == 1,
    }


def kills(corpora: Corpora, wanted: int) -> Result:
    """Kill the process at random instants and start it again, until `wanted` kills and a complete cache."""
    generator = random.Random(wanted)
    options = corpora.text(100_000_000) | {"tokenizer": corpora.tokenizer()}
    expected = finished(started(options | {"cache_dir": corpora.cache()}))
    num_kills, others, rounds, used_s = 0, 0, 0, 0.0
    while num_kills < wanted:
        options["cache_dir"], rounds = corpora.cache(), rounds + 1
        while num_kills < wanted:
            process = started(options)
            wait_s = generator.uniform(0, expected["wall_s"] / 2)
            try:
                process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                num_kills += 1
                used_s += wait_s
        done = finished(started(options) if process.returncode else process)
        used_s += done["wall_s"]
        others += done["fingerprint"] != expected["fingerprint"]
    return {
        "kills": num_kills,
        "caches made": rounds,
        "of them with other tokens": others,
        "time of a cache, all attempts together": f"{used_s / rounds / expected['wall_s']:.2f} of one without kills",
        "met": not others,
    }


def rows(corpora: Corpora, quick: bool) -> dict[str, Row]:
    """Return the rows by name."""
    return {
        "2 GB of text, bytes": partial(whole, corpora, lambda made: made.text(2_000_000_000), "bytes"),
        "2 GB of text, 4,096 tokens": partial(whole, corpora, lambda made: made.text(2_000_000_000), None),
        "1 million JSON lines, 4,096 tokens": partial(whole, corpora, lambda made: made.lines(1_000_000), None),
        "1 million JSON lines, bpe:4096 trained on them": partial(
            whole, corpora, lambda made: made.lines(1_000_000), f"bpe:{VOCABULARY}"
        ),
        "all cores beside one": partial(all_cores_beside_one, corpora, 1 if quick else ROUNDS),
        "kill -9 at random instants": partial(kills, corpora, 2 if quick else 20),
    }


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; the others keep their results.")
@click.option("--quick", is_flag=True, help="A thousandth of the text, into a temporary folder.")
def main(only: tuple[str, ...], quick: bool) -> None:
    """Run the rows and write results.json and results.md beside this file."""
    with tempfile.TemporaryDirectory() as place:
        found = rows(Corpora(Path(place), 1000 if quick else 1), quick)
        folder = folder_of_results(None, quick, HERE)
        record_promises(found, chosen(found, only), folder, ("Tokenising much text", "what is done"), quick=quick)


if __name__ == "__main__":
    main()
