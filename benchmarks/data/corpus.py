"""Text of any size made from the Python sources of this machine, the same for one seed as long as these are."""

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FILE_BYTES = 50_000_000


def write_text(folder: Path, num_bytes: int, seed: int) -> None:
    """Write text files: one has a quarter of the text, the others `FILE_BYTES` each."""
    folder.mkdir(parents=True)
    left, number, texts = num_bytes, 0, _texts(seed)
    while left > 0:
        size = min(left, num_bytes // 4 if number == 0 else FILE_BYTES)
        left -= size
        with (folder / f"{number:03}.txt").open("w", encoding="utf-8") as stream:
            while size > 0:
                text = next(texts)
                stream.write(text)
                size -= len(text)
        number += 1


def write_lines(folder: Path, num_lines: int, seed: int) -> None:
    """Write one file of JSON lines, whose texts have 500 characters on the mean."""
    folder.mkdir(parents=True)
    generator, texts, rest = random.Random(seed), _texts(seed), ""
    with (folder / "lines.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(num_lines):
            size = generator.randrange(1, 1000)
            while len(rest) < size:
                rest += next(texts)
            stream.write(json.dumps({"id": number, "text": rest[:size]}) + "\n")
            rest = rest[size:]


def _texts(seed: int) -> Iterator[str]:
    """Yield the sources in another order in each round, without end."""
    paths = sysconfig.get_paths()
    files = sorted({path for name in ("stdlib", "purelib") for path in Path(paths[name]).rglob("*.py")})
    generator = random.Random(seed)
    while True:
        generator.shuffle(files)
        for path in files:
            yield path.read_text(encoding="utf-8", errors="ignore")
