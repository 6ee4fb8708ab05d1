"""What a training file of LLaVA's size costs: seconds to open it first and later, memory of each process.

    python scripts/bench_data.py                    # 665,298 invented rows, about 1 GB of JSON in outputs/
    python scripts/bench_data.py --data llava_v1_5_mix665k.json

The first opening copies the JSON to Arrow; every later one maps that copy. A process's memory is counted as
Linux does: private (its own, "anonymous"), and mapped (pages of the file, which all processes share and the
kernel drops when it needs room). Prints one table; --json one object.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

CHILD = """
import json, os, random, sys, time
def memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile")]
import torch, transformers
from llava.data import LazySupervisedDataset, length_grouped_order
import datasets
before = memory()
start, cpu = time.perf_counter(), time.process_time()
data = LazySupervisedDataset(sys.argv[1], tokenizer=None, cache_dir=sys.argv[2])
opened, cpu = time.perf_counter() - start, time.process_time() - cpu
lengths = data.modality_lengths
start = time.perf_counter()
rng = random.Random(int(sys.argv[3]))
for index in (rng.randrange(len(data)) for _ in range(5000)):
    data.table[index]
rows = 5000 / (time.perf_counter() - start)
after = memory()
start = time.perf_counter()
length_grouped_order(lengths, 16, 8)
order = time.perf_counter() - start
print(json.dumps({"rows": len(data), "open_s": opened, "open_cpu_s": cpu, "rows_per_s": rows,
                  "order_s": order, "private_before": before[0], "private_added": after[0] - before[0],
                  "mapped_added": after[1] - before[1]}), flush=True)
sys.stdin.readline()  # stay until the others have been measured too
"""


def write_rows(path: Path, rows: int) -> None:
    """LLaVA's shapes, invented: one to nine rounds, one row in 18 without an image, ids of both types."""
    rng = random.Random(0)
    words = [
        "".join(rng.choice("abcdefghijklmnoprstuvw") for _ in range(rng.randint(2, 9))) for _ in range(5000)
    ]
    text = lambda low, high: " ".join(rng.choices(words, k=rng.randint(low, high)))  # noqa: E731
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write("[")
        for i in tqdm(range(rows), desc="inventing rows", unit=" rows", delay=1):
            turns = []
            for turn in range(rng.choice((1, 1, 3, 5, 5, 9))):
                question = text(4, 14) + "?"
                turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
                turns.append({"from": "gpt", "value": text(2, 45)})
            row = {
                "id": i if i % 3 else f"{i:012d}",
                "image": f"coco/train2017/{i:012d}.jpg",
                "conversations": turns,
            }
            if i % 18 == 0:
                row = {"id": row["id"], "model": "", "conversations": turns}
                turns[0]["value"] = turns[0]["value"].removeprefix("<image>\n")
            file.write((",\n" if i else "\n") + json.dumps(row, indent=1))
        file.write("\n]\n")
    os.replace(unfinished, path)


def measure(path: Path, cache: Path, processes: int) -> list[dict[str, float]]:
    """Open the file in as many processes at a time; each waits until all have been measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(cache), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for seed in range(processes)
    ]
    try:
        return [json.loads(child.stdout.readline()) for child in children]
    finally:
        for child in children:
            child.stdin.close()
            child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a file of yours instead of the invented one")
    parser.add_argument(
        "--rows", type=int, default=665_298, help="of the invented file (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=3, help="reading together (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("outputs/bench_data"), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    args = parser.parse_args()

    args.dir.mkdir(parents=True, exist_ok=True)
    path = args.data or args.dir / f"rows-{args.rows}.json"
    if not path.is_file():
        write_rows(path, args.rows)
    cache = args.dir / "cache"
    shutil.rmtree(cache, ignore_errors=True)

    first = measure(path, cache, 1)[0]
    together = measure(path, cache, args.processes)
    result = {
        "file_gb": path.stat().st_size / 1e9,
        "rows": first["rows"],
        "first_open_s": first["open_s"],
        "first_open_cpu_s": first["open_cpu_s"],
        "first_private_added_mb": first["private_added"],
        "second_open_s": max(one["open_s"] for one in together),
        "second_open_cpu_s": max(one["open_cpu_s"] for one in together),
        "imports_private_mb": max(one["private_before"] for one in together),
        "private_added_mb": max(one["private_added"] for one in together),
        "mapped_added_mb": max(one["mapped_added"] for one in together),
        "rows_per_s": min(one["rows_per_s"] for one in together),
        "order_s": max(one["order_s"] for one in together),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{path.name}: {result['rows']:,} rows, {result['file_gb']:.2f} GB")
    cpu = "first_open_cpu_s", "second_open_cpu_s"
    first_cpu, later_cpu = (f"({result[key]:.1f} s of a core)" for key in cpu)
    print(f"first opening (copies to Arrow)      {result['first_open_s']:8.1f} s {first_cpu}")
    print(f"later openings, {args.processes} at a time         {result['second_open_s']:8.1f} s {later_cpu}")
    print(f"memory of a process: imports alone   {result['imports_private_mb']:8.0f} MB private")
    print(f"  added by data and 5,000 rows read  {result['private_added_mb']:8.0f} MB private")
    print(f"                                     {result['mapped_added_mb']:8.0f} MB mapped, shared by all")
    print(f"rows read at random                  {result['rows_per_s']:8.0f} a second")
    print(f"length-grouped order of an epoch     {result['order_s']:8.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
