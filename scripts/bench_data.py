"""What a training file of LLaVA's size costs: seconds to open it first and later, memory of each process.

    python scripts/bench_data.py                    # 665,298 invented rows, about 1 GB of JSON in outputs/
    python scripts/bench_data.py --data llava_v1_5_mix665k.json

The first opening copies the JSON to Arrow; every later one maps that copy. "Cold": the copy was pushed out of
the system's page cache before. Three counts of a process's memory, as Linux has them: resident (RSS: whatever
is mapped at present, the shared pages of the file too, so several processes count them several times), shared
out (PSS: shared pages divided by their users), and private (USS: what ending the process would free). Each is
what the data adds to a process that has imported everything. Prints one table; --json one object.
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

MEMORY = ("Rss", "Pss", "Private")

CHILD = """
import json, os, random, sys, time
def memory():
    kib = {"Rss": 0, "Pss": 0, "Private": 0}
    with open("/proc/self/smaps_rollup") as file:
        for key, _, value in (line.partition(":") for line in file if "kB" in line):
            key = "Private" if key in ("Private_Clean", "Private_Dirty") else key
            if key in kib:
                kib[key] += int(value.split()[0])
    return {key: value / 1024 for key, value in kib.items()}
def added(before):
    return {key: value - before[key] for key, value in memory().items()}
import torch, transformers
from llava.data import LazySupervisedDataset, length_grouped_order
import datasets
print("imported", flush=True)
sys.stdin.readline()  # all have the libraries: what is shared shows as shared
before = memory()
start, cpu = time.perf_counter(), time.process_time()
data = LazySupervisedDataset(sys.argv[1], tokenizer=None, cache_dir=sys.argv[2])
found = {"rows": len(data), "open_s": time.perf_counter() - start, "open_cpu_s": time.process_time() - cpu}
print("open", flush=True)
sys.stdin.readline()
found["opened_mb"] = added(before)
rng = random.Random(int(sys.argv[3]))
start, peak = time.perf_counter(), dict.fromkeys(before, 0.0)
for number in range(5000):
    data.row(rng.randrange(len(data)))
    if number % 50 == 49:
        peak = {key: max(peak[key], value) for key, value in added(before).items()}
found |= {"rows_per_s": 5000 / (time.perf_counter() - start), "reading_mb": peak}
print("read", flush=True)
sys.stdin.readline()
lengths, start = data.modality_lengths, time.perf_counter()
length_grouped_order(lengths, 16, 8)
found["order_s"] = time.perf_counter() - start
print(json.dumps(found), flush=True)
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


def measure(path: Path, cache: Path, processes: int) -> list[dict]:
    """Open the file in as many processes together; they go from step to step in time with one another."""
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
    for step in ("imported", "open", "read"):
        for child in children:
            if child.stdout.readline().strip() != step:
                raise SystemExit("a measuring process has failed, see above")
        for child in children:
            child.stdin.write("go on\n")
            child.stdin.flush()
    results = [json.loads(child.communicate()[0]) for child in children]
    return results


def push_out(folder: Path) -> None:
    """Take the copy out of the page cache, as after a restart."""
    for file in folder.rglob("*.arrow"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
    push_out(cache)
    cold = measure(path, cache, 1)[0]
    together = measure(path, cache, args.processes)
    most = lambda key: max(one[key] for one in together)  # noqa: E731
    memory = lambda key: {name: max(one[key][name] for one in together) for name in MEMORY}  # noqa: E731
    result = {
        "file_gb": path.stat().st_size / 1e9,
        "rows": first["rows"],
        "processes": args.processes,
        "first_open_s": first["open_s"],
        "first_open_cpu_s": first["open_cpu_s"],
        "cold_open_s": cold["open_s"],
        "second_open_s": most("open_s"),
        "second_open_cpu_s": most("open_cpu_s"),
        "opened_mb": memory("opened_mb"),
        "reading_mb": memory("reading_mb"),
        "rows_per_s": min(one["rows_per_s"] for one in together),
        "order_s": most("order_s"),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{path.name}: {result['rows']:,} rows, {result['file_gb']:.2f} GB")
    cpu = "first_open_cpu_s", "second_open_cpu_s"
    first_cpu, later_cpu = (f"({result[key]:.1f} s of a core)" for key in cpu)
    print(f"first opening (copies to Arrow)     {result['first_open_s']:8.1f} s {first_cpu}")
    print(f"second opening, cold                {result['cold_open_s']:8.1f} s")
    print(f"later openings, {args.processes} together          {result['second_open_s']:8.1f} s {later_cpu}")
    print("added to each of these processes    resident  shared out  private (MB)")
    for key, label in (("opened_mb", "by opening"), ("reading_mb", "at most, reading 5,000 rows")):
        rss, pss, private = (result[key][name] for name in MEMORY)
        print(f"  {label:32}  {rss:8.0f}  {pss:10.0f}  {private:7.0f}")
    print(f"rows read at random                 {result['rows_per_s']:8.0f} a second")
    print(f"length-grouped order of an epoch    {result['order_s']:8.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
